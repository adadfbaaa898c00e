"""Rows of one text as two tokenizers have it, cut where both have a token that ends (`tokenizers.alignment`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax.data import packing
from atom_jax.data.config import DataConfig
from atom_jax.data.packing import Batch, Tokens, empty_batch, place
from atom_jax.data.pieces import Pieces
from atom_jax.data.pipeline import PackedRows
from atom_jax.tokenizers import alignment
from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.byte_view import byte_view


class PairedRows(PackedRows):
    """The given rows of every batch, each a stretch of one document: as `PackedRows` has them, tokens of the run's
    own tokenizer; "chunks" i32 [b, seq_len], the chunk of each, from 0, and -1 beyond the last; and of the other one
    "tokens" and "token_chunks", i32 [b, cfg.tokens]. What has no room on both sides begins the next row.

    other: the other tokenizer. words: chunks end only before spaces (`alignment.closes_at_spaces`). Raises AtomError
    where the tokens of either stand for no bytes.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Tokenizer, found: Sequence[Pieces], numbers: range, other: Any,
        words: bool = False,
    ):  # fmt: skip
        sides = [(side, byte_view(side)) for side in (tokenizer, other)]
        super().__init__(cfg, tokenizer, found, numbers, functools.partial(chunks, sides=sides, words=words))
        self.sizes, self.other = (cfg.seq_len, cfg.tokens), other

    def __next__(self) -> Batch:
        rows = [lane.take(min(self.sizes), self._room) for lane in self.lanes]
        batch = empty_batch(len(rows), self.sizes[0], self.pad_id)
        batch |= {"chunks": np.full(batch["ids"].shape, -1, np.int32)}
        batch |= {"tokens": np.full((len(rows), self.sizes[1]), self.other.pad_id, np.int32)}
        batch |= {"token_chunks": np.full(batch["tokens"].shape, -1, np.int32)}
        for i, row in enumerate(rows):
            (ids, ours), (others, theirs) = (_joined(row[: self._room(row)], side) for side in range(2))
            place(batch, i, 0, 1, ids, len(ids))
            batch["chunks"][i, : len(ids)] = ours
            batch["tokens"][i, : len(others)], batch["token_chunks"][i, : len(others)] = others, theirs
        return batch

    def _room(self, row: np.ndarray) -> int:
        """How many of these chunks have room in a row."""
        taken = np.array([[len(side) for side in chunk] for chunk in row]).cumsum(axis=0)
        return int(np.sum((taken <= self.sizes).all(axis=1)))


def described(cfg: DataConfig) -> Batch:
    """As `packing.described`, for these rows."""
    zero, shapes = np.int32(0), ((cfg.batch_size, cfg.seq_len), (cfg.batch_size, cfg.tokens))
    names = {"chunks": shapes[0], "tokens": shapes[1], "token_chunks": shapes[1]}
    return packing.described(cfg) | {name: np.broadcast_to(zero, shape) for name, shape in names.items()}


def chunks(piece: dict, sides: Sequence[tuple[Any, Any]], words: bool = False) -> Tokens:
    """The chunks of {"text", "first", "last"}: `ids` is object [c], of each the tokens i32 that either side has for
    it. What begins and ends documents are chunks of their own. sides: two tokenizers with their views. words: see
    `PairedRows`."""
    found, bounds = alignment.aligned([piece["text"]], sides), [packing.ends(piece, side) for side, _ in sides]
    if words:
        found = alignment.merged(found, alignment.closes_at_spaces(found, [view for _, view in sides]))
    parts = [
        np.split(side.ids, np.searchsorted(side.chunks, np.arange(1, 1 + side.chunks.max(initial=0))))
        for side in found
    ]
    head, tail = (tuple(np.array(bound[i], np.int32) for bound in bounds) for i in range(2))
    every = [pair for pair in (head, *zip(*parts)) if any(map(len, pair))] + [tail] * all(map(len, tail))
    return Tokens(np.fromiter(every, object, len(every)))


def _joined(row: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens i32 [n] of a side, and the chunk of each."""
    parts = [chunk[side] for chunk in row]
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return np.concatenate([np.zeros(0, np.int32), *parts]), numbers
