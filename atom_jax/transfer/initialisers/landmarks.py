"""A rotation between the principal components of shared tokens in a model with the target tokenizer and in the source
(mergekit's "landmark PCA", with the rotation that Procrustes asks for; its own is the transpose)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax.transfer.initialisers.base import Initialiser, Task, planes


@dataclasses.dataclass(frozen=True)
class Landmarks(Initialiser):
    """Needs `donor`."""

    name: ClassVar[str] = "landmarks"
    label: ClassVar[str] = "interpolated"
    needs: ClassVar[tuple[str, ...]] = ("donor",)

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        (donor,) = task.need(*self.needs)
        shared = task.need_shared()
        made = [
            carry(theirs[task.new], theirs[shared[:, 0]], task.table[shared[:, 1], plane])
            for plane, theirs in enumerate(planes(donor, task.table.shape[1]))
        ]
        return np.stack(made, axis=1).astype(np.float32), np.ones(len(task.new), bool)


def carry(x: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Vectors x [m, e] of the space of `theirs` [s, e] in the space of `ours` [s, d], row by row the same tokens."""
    mean_a, mean_b = theirs.mean(0), ours.mean(0)
    width = min(theirs.shape[1], ours.shape[1], max(len(theirs) - 1, 1))
    basis_a, basis_b = components(theirs - mean_a, width), components(ours - mean_b, width)
    a, b = (theirs - mean_a) @ basis_a.T, (ours - mean_b) @ basis_b.T
    return (x - mean_a) @ basis_a.T @ rotation(a, b) @ basis_b + mean_b


def rotation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The orthogonal matrix [e, e] for which a @ it is nearest to b, both [s, e]."""
    u, _, v = np.linalg.svd(a.T @ b)
    return u @ v


def components(x: np.ndarray, width: int) -> np.ndarray:
    """The first principal components [width, e] of centred vectors [s, e]."""
    return np.linalg.eigh(x.T @ x)[1].T[::-1][:width]
