"""Rows of token ids filled with documents that cannot see each other.

A row holds segments 1, 2, ...; positions start from 0 in each. A token's target is the next token of the same
piece of text, also when that token opens the next row; where there is none the loss mask is False. Every
token is the input at exactly one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from atom_jax.data.config import DataConfig
from atom_jax.tokenizers.base import Tokenizer, beginning
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.tokenizers.units import unit_ends

Batch = dict[str, np.ndarray]


class Tokens(NamedTuple):
    """Of a piece of text: ids i32 [n]; marks: bool [n], or None; learned: bool [n], those that are learned from, not
    only read, or None for all; weights: f32 [n], how many times each counts in the loss, or None: once each."""

    ids: np.ndarray
    marks: Any = None
    learned: Any = None
    weights: Any = None


def piece_tokens(piece: dict, tokenizer: Tokenizer, units: Tokenizer | None = None, prompt_end: str = "") -> Tokens:
    """Returns the tokens of {"text", "first", "last"}; given `units`, with their marks; what stands up to and with
    `prompt_end` (all, where it does not occur) is not learned from. With "answers" (`Corpus.marked`) there are
    weights: a token counts "weight" times that has a byte of an answer.

    The first piece of a document begins with what `beginning` says, the last ends with eos, where there is one.
    A token is marked when a piece of `units` ends with its last byte; bos and eos are not.
    """
    head, tail = ends(piece, tokenizer)
    asks, marks, answers = piece["first"] and prompt_end, None, piece.get("answers")
    if units is None and not asks and answers is None:
        text = tokenizer.encode(piece["text"])
    else:
        text, spans = tokenizer.spans(piece["text"])
    if units is not None:
        last = np.concatenate([[False], unit_ends(units, piece["text"])])
        # A token of no bytes (the end of a word) is not marked again.
        marks = np.pad(last[spans[:, 1]] & (spans[:, 1] > spans[:, 0]), (len(head), len(tail)))
    ids = np.concatenate([np.array(head, np.int32), text, np.array(tail, np.int32)])
    learned = None
    if asks:
        before, found, _ = piece["text"].partition(prompt_end.encode())
        after = spans[:, 0] >= len(before) + len(found)
        learned = np.concatenate([np.zeros(len(head), bool), after, np.ones(len(tail), bool)])
    weights = None
    if answers is not None:
        inside = (spans[:, :1] < answers[:, 1]) & (spans[:, 1:] > answers[:, 0])
        weights = np.where(inside.any(1), piece["weight"], 1.0).astype(np.float32)
        weights = np.pad(weights, (len(head), len(tail)), constant_values=1)
    return Tokens(ids.astype(np.int32, copy=False), marks, learned, weights)


def ends(piece: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after the text of a piece: `beginning` where it is the first of a document, eos where it
    is the last."""
    return beginning(tokenizer) if piece["first"] else [], list(tokenizer.eos_ids[:1]) if piece["last"] else []


def subwords(piece: dict, tokenizer: BolmoTokenizer) -> Tokens:
    """Returns the subwords of {"text", "first", "last"}; the last piece of a document ends with the one that ends
    documents."""
    ids = tokenizer.subwords.encode(piece["text"])
    return Tokens(np.append(ids, np.int32(tokenizer.document_id)) if piece["last"] else ids)


def empty_batch(rows: int, seq_len: int, pad_id: int, marks: bool = False, weights: bool = False) -> Batch:
    """Returns a batch of padding, [rows, seq_len] each: ids and targets are pad_id, the rest 0 or False.
    marks, weights: whether it has an array for them."""
    shape = (rows, seq_len)
    batch = {
        "ids": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    batch |= {"marks": np.zeros(shape, bool)} if marks else {}
    return batch | {"loss_weights": np.zeros(shape, np.float32)} if weights else batch


def described(cfg: DataConfig) -> Batch:
    """Returns a batch of zeros as the iterator of a configuration has them, which takes no memory: for its shapes."""
    shape = cfg.batch_size, cfg.seq_len
    one = empty_batch(1, 1, 0, bool(cfg.marks), cfg.weighs)
    one = {k: np.broadcast_to(x, shape) for k, x in one.items()}
    if not cfg.tokens:
        return one
    more = {"suffix": shape, "state": shape[:1], "tokens": (shape[0], cfg.tokens), "lengths": (shape[0], cfg.tokens)}
    return one | {k: np.broadcast_to(np.int32(0), size) for k, size in more.items()}


def place(
    batch: Batch,
    row: int,
    at: int,
    segment: int,
    ids: np.ndarray,
    take: int,
    learned: Any = None,
    weights: Any = None,
) -> None:
    """Writes ids[:take] into a row from column `at` on, as one segment.

    ids: i32 [n], n >= take; when n is greater, the last of them has a target too.
    learned: bool [n], those that count in the loss as targets; None: all.
    weights: f32 [n], how many times each counts, for batches that have "loss_weights"; None: once.
    """
    end = at + take
    batch["ids"][row, at:end] = ids[:take]
    batch["positions"][row, at:end] = np.arange(take, dtype=np.int32)
    batch["segments"][row, at:end] = segment
    targets = ids[1 : take + 1]
    batch["targets"][row, at : at + len(targets)] = targets
    batch["loss_mask"][row, at : at + len(targets)] = True if learned is None else learned[1 : take + 1]
    if "loss_weights" in batch:
        batch["loss_weights"][row, at : at + len(targets)] = 1 if weights is None else weights[1 : take + 1]
