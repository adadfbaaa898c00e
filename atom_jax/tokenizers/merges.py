"""Which two tokens of a byte-level BPE stay apart, from its merges alone."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

_LATE = np.iinfo(np.int32).max


class Merges:
    """The merges of a vocabulary.

    left, right, rank: i32 [ids], what each token is merged of, -1 where it is a single symbol, and when. sure: bool
    [ids], tokens that only one merge makes, and so their parts, or that are single symbols.
    """

    def __init__(self, size: int, table: np.ndarray, single: np.ndarray):
        """table: i32 [merges, 3] of left, right and whole, in their order. single: bool [size], tokens of one symbol.
        Raises ValueError where a merge comes before what makes its parts."""
        self.left, self.right = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.rank = np.full(size, -1, np.int32)
        a, b, whole = table.T
        self.left[whole], self.right[whole], self.rank[whole] = a, b, np.arange(len(table))
        self.sure = np.where(self.rank < 0, single, np.bincount(whole, minlength=size) == 1)
        first = np.full(size, -1, np.int32)
        first[whole[::-1]] = np.arange(len(table))[::-1]
        if (np.maximum(first[a], first[b]) >= np.arange(len(table))).any():
            raise ValueError("a merge comes before its parts")
        for l, r, i in table.tolist():
            self.sure[i] &= self.sure[l] and self.sure[r]
        order = np.argsort(a, kind="stable")
        self._next, self._when = b[order], order.astype(np.int32)
        self._begin = np.searchsorted(a[order], np.arange(size + 1))

    @classmethod
    def of(cls, backend: Any, size: int) -> Merges | None:
        """Those of a tokenizer of the `tokenizers` package; None where its model does more than merge, or merges in
        another order than it was made in."""
        model = json.loads(backend.to_str())["model"]
        strange = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get("type") != "BPE" or any(model.get(name) for name in strange) or not model["merges"]:
            return None
        ids, pairs = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        single = np.zeros(size, bool)
        single[[i for token, i in ids.items() if len(token) == 1 and i < size]] = True
        try:
            return cls(size, np.array([[ids[a], ids[b], ids[a + b]] for a, b in pairs], np.int32), single)
        except (KeyError, IndexError, ValueError):
            return None

    @functools.cached_property
    def _spines(self) -> tuple[np.ndarray, np.ndarray]:
        """What stands at the left edge of each token while it is merged, from the whole down, i32 [ids, depth] (ids:
        nothing), and when each of these is merged on."""
        size, columns = len(self.left), [np.arange(len(self.left), dtype=np.int32)]
        whens, left = [np.full(size, _LATE, np.int32)], np.append(self.left, -1)
        rank = np.append(self.rank, -1)
        while True:
            inner = left[columns[-1]]
            if (inner < 0).all():
                return np.stack(columns, axis=1), np.stack(whens, axis=1)
            whens.append(rank[columns[-1]])
            columns.append(np.where(inner < 0, size, inner).astype(np.int32))

    def apart(self, a: int, others: np.ndarray) -> np.ndarray:
        """bool [n]: whether BPE makes [a, b] of the bytes of both, for every b of `others`; all of them `sure`, and
        each what is made of its own bytes.

        They don't stay apart where something at the right edge of a merges with something at the left edge of b,
        before either is merged into what is around it; of equal merges the leftmost comes first.
        """
        spines, whens = self._spines
        spines, whens, out = spines[others], whens[others], np.ones(len(others), bool)
        x, when = a, _LATE
        table = np.full(len(self.left) + 1, _LATE, np.int32)
        while x >= 0:
            part = slice(self._begin[x], self._begin[x + 1])
            table[self._next[part]] = self._when[part]
            crossing = table[spines]
            out &= ~((crossing < when) & (crossing <= whens)).any(axis=1)
            table[self._next[part]] = _LATE
            when, x = self.rank[x], int(self.right[x])
        return out
