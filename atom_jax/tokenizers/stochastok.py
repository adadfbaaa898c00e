"""StochasTok (2506.01687): now and then a token of a training text becomes two tokens with the same bytes, so that a
model learns what its tokens are made of. The text stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from atom_jax.tokenizers.byte_view import ByteView


class Splits(NamedTuple):
    """The ways to cut every token of a vocabulary into two others: those of token i are left[j] and right[j] for j
    from offsets[i] to offsets[i + 1], the shortest left part first.

    offsets i64 [ids + 1]; left, right i32 [ways].
    """

    offsets: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the ways of tokens begin, and how many they are, i64 [n] each; none for ids beyond the vocabulary."""
        known = ids < len(self.offsets) - 1
        at = np.where(known, ids, 0)
        return self.offsets[at], np.where(known, self.offsets[at + 1] - self.offsets[at], 0)


def split_table(view: ByteView) -> Splits:
    """The ways of a vocabulary, in which special tokens have none. Of tokens with the same bytes, texts get the first
    of `view.ids`, and so do these."""
    counts, left, right = np.zeros(view.size + 1, np.int64), [], []
    for i, piece in sorted(view.pieces.items()):
        for at in range(1, len(piece)):
            if (a := view.ids.get(piece[:at])) and (b := view.ids.get(piece[at:])):
                counts[i + 1] += 1
                left.append(a[0])
                right.append(b[0])
    return Splits(np.cumsum(counts), np.array(left, np.int32), np.array(right, np.int32))


def expand(
    ids: np.ndarray, splits: Splits, share: float, place: Callable[[int], int], way: Callable[[int], int]
) -> np.ndarray:
    """The authors' procedure: floor(share * n) times a place is drawn in the sequence as it is by then, and the token
    there, where it can be cut, is replaced by one of its ways, which is drawn too.

    ids i32 [n]. place, way: draw one of so many. Returns i32 [m].
    """
    out = np.asarray(ids).tolist()
    for _ in range(int(share * len(out))):
        at = place(len(out))
        first, count = (int(x) for x in splits.of(np.array(out[at])))
        if count:
            j = first + way(count)
            out[at : at + 1] = [int(splits.left[j]), int(splits.right[j])]
    return np.array(out, np.int32)


def scatter(ids: np.ndarray, splits: Splits, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same process, ended by a clock instead of a count, for all tokens at once: each is tried at the moments of
    a Poisson process, and so are its parts from then on, until log(1 + share) has passed. Up to share * n tries are
    to be expected, and no fewer than log(1 + share) * n.

    ids i32 [n]. Returns the tokens i32 [m], and i64 [m], which of the n each is a part of.
    """
    out, source = np.asarray(ids, np.int32), np.arange(len(ids))
    left = np.full(len(ids), np.log1p(share))
    while True:
        first, count = splits.of(out)
        tried = np.flatnonzero((left > 0) & (count > 0))
        rest = left[tried] - rng.exponential(size=len(tried))
        cut, rest = tried[rest > 0], rest[rest > 0]
        if not len(cut):
            return out, source
        j = first[cut] + rng.integers(count[cut])
        parts = np.ones(len(out), np.int64)
        parts[cut] = 2
        at = (np.cumsum(parts) - parts)[cut]
        out, source, left = np.repeat(out, parts), np.repeat(source, parts), np.zeros(parts.sum())
        out[at], out[at + 1] = splits.left[j], splits.right[j]
        left[at] = left[at + 1] = rest
