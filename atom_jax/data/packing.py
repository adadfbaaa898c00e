"""Rows of token ids filled with documents that cannot see each other.

A row holds segments 1, 2, ...; positions start from 0 in each. A token's target is the next token of the same
piece of text, also when that token opens the next row; where there is none the loss mask is False. Every
token is the input at exactly one place.
"""

from __future__ import annotations

import numpy as np

from atom_jax.tokenizers.base import Tokenizer, beginning
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.tokenizers.units import unit_ends

Batch = dict[str, np.ndarray]


Tokens = tuple[np.ndarray, np.ndarray | None]


def piece_tokens(piece: dict, tokenizer: Tokenizer, units: Tokenizer | None = None) -> Tokens:
    """Returns the tokens i32 [n] of {"text", "first", "last"} and, given `units`, their marks bool [n], else None.

    The first piece of a document begins with what `beginning` says, the last ends with eos, where there is one.
    A token is marked when a piece of `units` ends with its last byte; bos and eos are not.
    """
    end = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    head = beginning(tokenizer) if piece["first"] else []
    tail = [end] if piece["last"] and end is not None else []
    if units is None:
        text, marks = tokenizer.encode(piece["text"]), None
    else:
        text, spans = tokenizer.spans(piece["text"])
        ends = np.concatenate([[False], unit_ends(units, piece["text"])])
        # A token of no bytes (the end of a word) is not marked again.
        marks = np.pad(ends[spans[:, 1]] & (spans[:, 1] > spans[:, 0]), (len(head), len(tail)))
    ids = np.concatenate([np.array(head, np.int32), text, np.array(tail, np.int32)])
    return ids.astype(np.int32, copy=False), marks


def subwords(piece: dict, tokenizer: BolmoTokenizer) -> Tokens:
    """Returns (i32 [n], None): the subwords of {"text", "first", "last"}; the last piece of a document ends with the
    one that ends documents."""
    ids = tokenizer.subwords.encode(piece["text"])
    return (np.append(ids, np.int32(tokenizer.document_id)) if piece["last"] else ids), None


def piece_ids(piece: dict, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens alone of `piece_tokens`."""
    return piece_tokens(piece, tokenizer)[0]


def empty_batch(rows: int, seq_len: int, pad_id: int, marks: bool = False) -> Batch:
    """Returns a batch of padding, [rows, seq_len] each: ids and targets are pad_id, the rest 0 or False.
    marks: whether it has an array for them."""
    shape = (rows, seq_len)
    batch = {
        "ids": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    return batch | {"marks": np.zeros(shape, bool)} if marks else batch


def place(batch: Batch, row: int, at: int, segment: int, ids: np.ndarray, take: int, known: int = 0) -> None:
    """Writes ids[:take] into a row from column `at` on, as one segment.

    ids: i32 [n], n >= take; when n is greater, the last of them has a target too.
    known: the first `known` targets are left out of the loss.
    """
    end = at + take
    batch["ids"][row, at:end] = ids[:take]
    batch["positions"][row, at:end] = np.arange(take, dtype=np.int32)
    batch["segments"][row, at:end] = segment
    targets = ids[1 : take + 1]
    batch["targets"][row, at : at + len(targets)] = targets
    batch["loss_mask"][row, at + known : at + len(targets)] = True
