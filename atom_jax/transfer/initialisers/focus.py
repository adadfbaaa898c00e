"""FOCUS: a token's row is a sparse mean of those of shared tokens that resemble it among auxiliary vectors (Dobler
and de Melo, 2023)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax.transfer.initialisers.base import Initialiser, Task, blocks, mix, unit

# Candidates that the support of a sparsemax is looked for in first.
_FEW = 1024


@dataclasses.dataclass(frozen=True)
class Focus(Initialiser):
    """Needs `target_vectors`, for example of `vectors.from_text`: the paper trains fastText on text in target tokens.
    Tokens without a vector are no anchors, and new ones among them are left to the fallback. Shared are tokens with
    the same bytes; the paper's fuzzy matching is left out."""

    name: ClassVar[str] = "focus"
    label: ClassVar[str] = "interpolated"
    needs: ClassVar[tuple[str, ...]] = ("target_vectors",)

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        (vectors,) = task.need(*self.needs)
        shared = task.need_shared()
        known = np.abs(vectors).sum(1) > 0
        anchors = shared[known[shared[:, 0]]]
        found = known[task.new] & (len(anchors) > 0)
        out = np.zeros((len(task.new), *task.table.shape[1:]), np.float32)
        points, base, rows = unit(vectors[anchors[:, 0]]), task.table[anchors[:, 1]], np.flatnonzero(found)
        for part in blocks(len(rows)):
            out[rows[part]] = mix(sparsemax(unit(vectors[task.new[rows[part]]]) @ points.T), base)
        return out, found


def sparsemax(z: np.ndarray) -> np.ndarray:
    """The point of the simplex nearest to each row of z [m, s] (Martins and Astudillo, 2016)."""
    few = min(_FEW, z.shape[1])
    while True:
        high = -np.sort(-np.partition(z, z.shape[1] - few, axis=1)[:, z.shape[1] - few :], axis=1)
        k, total = np.arange(1, few + 1), np.cumsum(high, axis=1)
        size = np.sum(1 + k * high > total, axis=1)
        if few == z.shape[1] or size.max() < few:
            break
        few = z.shape[1]
    threshold = (np.take_along_axis(total, size[:, None] - 1, axis=1) - 1) / size[:, None]
    return np.maximum(z - threshold, 0.0).astype(z.dtype)
