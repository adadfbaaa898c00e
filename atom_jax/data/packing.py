"""Rows of token ids filled with documents that cannot see each other.

A row holds segments 1, 2, ...; positions start from 0 in each. A token's target is the next token of the same
piece of text, also when that token opens the next row; where there is none the loss mask is False. Every
token is the input at exactly one place.
"""

from __future__ import annotations

import numpy as np

from atom_jax.tokenizers.base import Tokenizer

Batch = dict[str, np.ndarray]


def piece_ids(piece: dict, tokenizer: Tokenizer) -> np.ndarray:
    """Returns i32 [n], the tokens of {"text", "first", "last"}.

    The first piece of a document begins with bos, the last ends with eos, where the tokenizer has them.
    Without bos, eos goes in front too: the first token of the text then has something to be predicted from.
    """
    end = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    front = end if tokenizer.bos_id is None else tokenizer.bos_id
    head = [front] if piece["first"] and front is not None else []
    tail = [end] if piece["last"] and end is not None else []
    parts = (np.array(head, np.int32), tokenizer.encode(piece["text"]), np.array(tail, np.int32))
    return np.concatenate(parts).astype(np.int32, copy=False)


def empty_batch(rows: int, seq_len: int, pad_id: int) -> Batch:
    """Returns a batch of padding, [rows, seq_len] each: ids and targets are pad_id, the rest 0 or False."""
    shape = (rows, seq_len)
    return {
        "ids": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }


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
