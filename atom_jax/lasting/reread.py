"""Passages of what was read, found again by their words: BM25 (Robertson et al., 1994) over token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH, STRIDE = 64, 32
K1, B = 1.2, 0.75


def again(texts: Sequence[np.ndarray], query: np.ndarray, n: int) -> np.ndarray:
    """Ids of `passages`, i32 [p], the best one last."""
    found = passages(texts, query, n) if n else []
    return np.concatenate([np.zeros(0, np.int32), *(texts[i][a:b] for i, a, b in found[::-1])])


def passages(texts: Sequence[np.ndarray], query: np.ndarray, n: int) -> list[tuple[int, int, int]]:
    """(text, first token, end) of the n passages of all texts, i32 [t], that share most with a query, i32 [q], best
    first; of equal ones the newest. Passages have 64 tokens, one begins every 32; those that share nothing are left
    out."""
    starts = [np.arange(0, max(len(ids) - STRIDE, 1), STRIDE) for ids in texts]
    which = np.repeat(np.arange(len(texts)), list(map(len, starts)))
    ends = [np.minimum(first + LENGTH, len(ids)) for first, ids in zip(starts, texts)]
    size = np.concatenate([b - a for a, b in zip(starts, ends)] or [np.zeros(0)])
    weight = K1 * (1 - B + B * size / max(size.mean() if size.size else 1, 1))
    total = np.zeros(len(size))
    for term in np.unique(query):
        sums = [np.append(0, np.cumsum(ids == term)) for ids in texts]
        count = np.concatenate([s[b] - s[a] for s, a, b in zip(sums, starts, ends)] or [np.zeros(0)])
        holding = np.count_nonzero(count)
        rarity = np.log1p((len(size) - holding + 0.5) / (holding + 0.5))
        total += rarity * count * (K1 + 1) / (count + weight)
    best = np.lexsort((-np.arange(len(total)), -total))[:n]
    first, end = (np.concatenate(x or [np.zeros(0)]) for x in (starts, ends))
    return [(int(which[i]), int(first[i]), int(end[i])) for i in best if total[i] > 0]
