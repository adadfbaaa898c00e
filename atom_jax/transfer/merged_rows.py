"""Rows for tokens that a vocabulary lacks, such as dynamic tokenization makes (`tokenizers.dynamic`)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from atom_jax.tokenizers.byte_view import ByteView
from atom_jax.transfer.initialisers.fvt import FVT
from atom_jax.typing import AtomError


class MergedRows:
    """A table of fixed size with rows of such tokens. A row is the mean of those of the pieces that the tokenizer's
    model cuts the token's bytes into (FVT); it is made once and stays until others need the place, those longest
    unused first, but never one of the same batch.

    table: f32 [capacity, n, d], n planes as in `initialisers.base`. The paper's 5000 rows are the default.
    """

    def __init__(self, view: ByteView, source: np.ndarray, capacity: int = 5000, method: FVT | None = None):
        """source: f32 [v, n, d], the rows of the vocabulary."""
        if capacity < 1:
            raise AtomError(f"capacity: expected at least 1, got {capacity}")
        self.view, self.source, self.method = view, source, method or FVT()
        self.table = np.zeros((capacity, *source.shape[1:]), np.float32)
        self._slots: collections.OrderedDict[bytes, int] = collections.OrderedDict()

    def slots(self, pieces: Sequence[bytes]) -> np.ndarray:
        """Places i32 [n] in the table of the rows of these tokens of one batch, by their bytes.

        Raises AtomError for more tokens than there are rows, and for one that the model cannot cut.
        """
        unique = dict.fromkeys(pieces)
        if len(unique) > len(self.table):
            raise AtomError(f"a batch has {len(unique)} merged tokens, the table holds {len(self.table)}")
        new = [piece for piece in unique if piece not in self._slots]
        cuts = [np.array(self.view.cut(piece), np.int64) for piece in new]
        for piece, cut in zip(new, cuts):
            if not len(cut) or cut.max() >= len(self.source):
                raise AtomError(f"{self.view.name}: {piece[:40]!r} is cut into no tokens that have rows")
        for piece in unique:
            if piece in self._slots:
                self._slots.move_to_end(piece)
        at = [len(self._slots) + i for i in range(min(len(new), len(self.table) - len(self._slots)))]
        at += [self._slots.popitem(last=False)[1] for _ in range(len(new) - len(at))]
        self.table[at] = self.method.compose(cuts, self.source)
        self._slots.update(zip(new, at))
        return np.array([self._slots[piece] for piece in pieces], np.int32)
