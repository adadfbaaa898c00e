"""Bolmo's bytes: ids that also say where patches end, and the subwords that end at each byte."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax.tokenizers import suffix
from atom_jax.tokenizers.bytes import ByteTokenizer, to_utf8
from atom_jax.tokenizers.suffix import SPECIALS, SYMBOLS
from atom_jax.typing import AtomError

# What the tokenizers of the released models call their specials, where their file alone does not say.
_NAMES = {"eos": "<|endoftext|>", "pad": "<|pad|>"}


class BolmoTokenizer(ByteTokenizer):
    """Byte b is id b + 4; 1 begins and ends a document, 0 is padding, 2 and 3 are not used. Id + 260 is the same
    symbol where it ends a patch.

    subwords: the `JsonTokenizer` of the model that the Bolmo was made from, whose vocabulary `suffix_ids` needs.
    """

    name = "bolmo"
    vocab_size = 2 * SYMBOLS
    bos_id = 1
    eos_ids = (1, 1 + SYMBOLS)
    pad_id = 0

    def __init__(self, subwords: Any = None):
        self.subwords = subwords

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns i32 [n], the bytes of `text`, none at the end of a patch; AtomError for a lone surrogate."""
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32) + SPECIALS

    def decode_bytes(self, ids) -> bytes:
        """Returns the bytes of `ids`, without the special ones; AtomError for ids outside [0, 520)."""
        ids = self._known(ids) % SYMBOLS
        return (ids[ids >= SPECIALS] - SPECIALS).astype(np.uint8).tobytes()

    @functools.cached_property
    def tables(self) -> suffix.Tables | None:
        """The automaton of the subwords, or None without them."""
        if self.subwords is None:
            return None
        pad = self.subwords.own_pad_id
        return suffix.build(self.subwords.pieces, self.document_id, self._named("pad") if pad is None else pad)

    @property
    def document_id(self) -> int | None:
        """The subword that ends a document, and stands for id 1."""
        return next(iter(self.subwords.eos_ids), self._named("eos"))

    def _named(self, kind: str) -> int | None:
        name = _NAMES[kind].encode()
        return next((i for i, piece in self.subwords.pieces.items() if piece == name), None)

    def suffix_states(self, ids) -> np.ndarray:
        """Returns i32 [b, t]: the automaton's states after each of ids [b, t]. AtomError without subwords."""
        if self.tables is None:
            raise AtomError(
                "this Bolmo tokenizer has no subwords: give it the tokenizer.json its model was made with"
            )
        return suffix.states(self.tables, np.asarray(ids), max(map(len, self.subwords.pieces.values())))

    def suffix_ids(self, ids) -> np.ndarray:
        """Returns i32 [b, t]: the subword that is the longest to end at each position of ids [b, t], beginning at the
        row's own beginning or at its latest bos. AtomError without subwords."""
        states = self.suffix_states(ids)
        return self.tables.out[states]

    def spell(self, rows: Sequence[np.ndarray], tokens: int, length: int) -> dict[str, np.ndarray]:
        """Rows of subwords i32 [n], n < tokens, with their bytes: arrays by name, [b, length] for bytes (a bos and
        those of all subwords that have room) and [b, tokens] for subwords.

        ids, positions, segments, targets, loss_mask as in a batch of text; suffix: the subword that ends at each
        byte; state i32 [b]: of the automaton after a row. tokens: the subwords, then the one that ends a document;
        lengths: bytes of the bos and of each subword, 0 for those without room. AtomError without subwords.
        """
        flat, starts, sizes = self._spellings
        shape = (len(rows), length)
        ids, ours = np.zeros(shape, np.int32), np.full((len(rows), tokens), self.document_id, np.int32)
        lengths = np.zeros(ours.shape, np.int32)
        for i, row in enumerate(rows):
            n = self.room(row, length)
            theirs = flat[suffix.ranges(starts[row[:n]], sizes[row[:n]])]
            ids[i, 0], ids[i, 1 : 1 + len(theirs)] = self.bos_id, theirs
            ours[i, : len(row)], lengths[i, : n + 1] = row, [1, *sizes[row[:n]]]
        at, total = np.broadcast_to(np.arange(length, dtype=np.int32), shape), lengths.sum(1, keepdims=True)
        targets, counts, states = np.pad(ids[:, 1:], ((0, 0), (0, 1))), at < total - 1, self.suffix_states(ids)
        return {
            "ids": ids, "positions": at, "segments": (at < total).astype(np.int32),
            "targets": np.where(counts, targets, 0), "loss_mask": counts, "suffix": self.tables.out[states],
            "state": np.take_along_axis(states, total - 1, axis=1)[:, 0], "tokens": ours, "lengths": lengths,
        }  # fmt: skip

    def room(self, row: np.ndarray, length: int) -> int:
        """How many of these subwords have room in `length` bytes, after a bos."""
        return int(np.sum(1 + np.cumsum(self._spellings[2][row]) <= length))

    @functools.cached_property
    def _spellings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of the bytes of all subwords, one after the other, and where each begins and how many it has."""
        if self.subwords is None:
            raise AtomError("this Bolmo tokenizer has no subwords to spell: give it its source's tokenizer.json")
        end, pieces = self.document_id, self.subwords.pieces
        words = [pieces.get(i, b"") for i in range(max(self.subwords.vocab_size, max(pieces) + 1))]
        spelled = [[self.bos_id] if i == end else [b + SPECIALS for b in word] for i, word in enumerate(words)]
        sizes = np.array([len(s) for s in spelled], np.int32)
        return np.array([b for s in spelled for b in s], np.int32), np.cumsum(sizes) - sizes, sizes

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files of the subwords' tokenizer."""
        if self.subwords is not None:
            self.subwords.save(directory)
