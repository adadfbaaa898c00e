"""Bolmo's bytes: ids that also say where patches end, and the subwords that end at each byte."""

from __future__ import annotations

import functools
import os
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

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files of the subwords' tokenizer."""
        if self.subwords is not None:
            self.subwords.save(directory)
