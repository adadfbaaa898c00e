"""Interpolation between the nearest shared tokens, found in a model that has the target tokenizer (mergekit's "common
interpolation")."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.transfer.initialisers.base import Initialiser, Task, blocks, mix_at, planes, top, unit
from atom_jax.typing import AtomError

_METRICS, _SCHEMES = ("euclidean", "cosine"), ("distance", "barycentric", "least_squares")


@dataclasses.dataclass(frozen=True)
class Neighbours(Initialiser):
    """Needs `donor`.

    k: neighbours. metric: euclidean or cosine. scheme: distance (weights are inverse distances, or cosines),
    barycentric (weights that add up to 1 and come nearest to the token) or least_squares (any weights).
    """

    name: ClassVar[str] = "neighbours"
    label: ClassVar[str] = "interpolated"
    needs: ClassVar[tuple[str, ...]] = ("donor",)
    k: int = 8
    metric: str = "euclidean"
    scheme: str = "distance"

    def __post_init__(self):
        config.check(self, k=(1, 4096))
        for name, known in (("metric", _METRICS), ("scheme", _SCHEMES)):
            if getattr(self, name) not in known:
                raise AtomError(f"{name}={getattr(self, name)}: expected one of {', '.join(known)}")

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        (donor,) = task.need(*self.needs)
        shared = task.need_shared()
        out = np.zeros((len(task.new), *task.table.shape[1:]), np.float32)
        for plane, theirs in enumerate(planes(donor, task.table.shape[1])):
            points, base = theirs[shared[:, 0]], task.table[shared[:, 1], plane]
            for part in blocks(len(task.new)):
                at, weights = self.weigh(theirs[task.new[part]], points)
                out[part, plane] = mix_at(weights, at, base)
        return out, np.ones(len(task.new), bool)

    def weigh(self, x: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which k of the points [s, e] are near each of the vectors x [m, e], nearest first, and their weights."""
        if self.metric == "cosine":
            near, at = top(unit(x) @ unit(points).T, self.k)
            distance = 1.0 - near
        else:
            square = (x * x).sum(1)[:, None] + (points * points).sum(1)[None] - 2.0 * x @ points.T
            near, at = top(-square, self.k)
            distance = np.sqrt(np.maximum(-near, 0.0))
        chosen = points[at]
        if self.scheme == "distance":
            w = 1.0 - distance if self.metric == "cosine" else 1.0 / np.maximum(distance, 1e-6)
            return at, w / np.maximum(w.sum(1, keepdims=True), 1e-6)
        if self.scheme == "barycentric":
            return at, _barycentric(x, chosen)
        solve = zip(np.swapaxes(chosen, 1, 2), x)
        return at, np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in solve])


def _barycentric(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Weights [m, k] that add up to 1 of points [m, k, e] whose sum is nearest to x [m, e]."""
    m, k, _ = chosen.shape
    left = np.ones((m, k + 1, k + 1), chosen.dtype)
    left[:, :k, :k], left[:, k, k] = chosen @ np.swapaxes(chosen, 1, 2), 0.0
    right = np.concatenate([np.einsum("mke,me->mk", chosen, x), np.ones((m, 1), x.dtype)], axis=1)
    return np.stack([np.linalg.lstsq(a, b, rcond=None)[0][:k] for a, b in zip(left, right)])
