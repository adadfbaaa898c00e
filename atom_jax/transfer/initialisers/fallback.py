"""Rows that are drawn or the same for all, for tokens of which nothing else is known."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.transfer.initialisers.base import Initialiser, Task


@dataclasses.dataclass(frozen=True)
class _Fallback(Initialiser):
    label: ClassVar[str] = "fallback"

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        made = np.stack([self._plane(task.table[:, i], len(task.new), i) for i in range(task.table.shape[1])], axis=1)
        return made.astype(np.float32), np.ones(len(task.new), bool)

    def _plane(self, table: np.ndarray, m: int, plane: int) -> np.ndarray:
        """Rows [m, d] from one plane [v, d]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Normal(_Fallback):
    """Draws with the mean and deviation of the table's rows, dimension by dimension."""

    name: ClassVar[str] = "normal"
    seed: int = 0

    def __post_init__(self):
        config.check(self, seed=(0, 2**31 - 1))

    def _plane(self, table: np.ndarray, m: int, plane: int) -> np.ndarray:
        noise = np.random.default_rng((self.seed, plane)).standard_normal((m, table.shape[1]), np.float32)
        return table.mean(0) + table.std(0) * noise


@dataclasses.dataclass(frozen=True)
class Covariance(_Fallback):
    """Draws with the mean and the covariance of the table's rows (Hewitt, 2021, "Initializing New Word Embeddings for
    Pretrained Language Models")."""

    name: ClassVar[str] = "covariance"
    seed: int = 0

    def __post_init__(self):
        config.check(self, seed=(0, 2**31 - 1))

    def _plane(self, table: np.ndarray, m: int, plane: int) -> np.ndarray:
        mean = table.mean(0)
        variances, basis = np.linalg.eigh(np.cov(table.T, bias=True).reshape(table.shape[1], -1))
        noise = np.random.default_rng((self.seed, plane)).standard_normal((m, table.shape[1]), np.float32)
        return mean + noise * np.sqrt(np.maximum(variances, 0.0)) @ basis.T


@dataclasses.dataclass(frozen=True)
class Mean(_Fallback):
    """The mean of all rows."""

    name: ClassVar[str] = "mean"

    def _plane(self, table: np.ndarray, m: int, plane: int) -> np.ndarray:
        return np.repeat(table.mean(0, keepdims=True), m, axis=0)


@dataclasses.dataclass(frozen=True)
class Zero(_Fallback):
    """Zeros."""

    name: ClassVar[str] = "zero"

    def _plane(self, table: np.ndarray, m: int, plane: int) -> np.ndarray:
        return np.zeros((m, table.shape[1]), np.float32)
