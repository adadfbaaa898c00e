"""What every initialiser of embeddings is given, and what it returns.

Dimension letters: v rows of the source's table, n planes (input embedding; output embedding where it has a table of
its own), d width, m rows that are wanted, s tokens that both vocabularies share, e width of auxiliary vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from atom_jax.params import Tree
from atom_jax.tokenizers.byte_view import ByteView
from atom_jax.transfer.hypernet import Hypernet
from atom_jax.typing import AtomError

# Rows that are made at once: bounds what [rows, shared tokens] takes.
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Aux:
    """What some methods need beside the two tokenizers.

    donor: f32 [target ids, n, e], the table of a model with the target tokenizer; one plane where that is tied.
    source_vectors, target_vectors: f32 [ids, e], vectors of the tokens of either vocabulary in one space; zeros where
        a token has none.
    embed: texts -> f32 [texts, e].
    hypernet: a trained network and its parameters (`transfer.hypernet`).
    """

    donor: np.ndarray | None = None
    source_vectors: np.ndarray | None = None
    target_vectors: np.ndarray | None = None
    embed: Callable[[Sequence[str]], np.ndarray] | None = None
    hypernet: tuple[Hypernet, Tree] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of a new table to be made.

    source, target: the vocabularies. table: f32 [v, n, d], the source's. new: i64 [m], target ids that need a row.
    shared: i64 [s, 2], (target id, source id) of ordinary tokens that stand for the same bytes.
    """

    source: ByteView
    target: ByteView
    table: np.ndarray
    new: np.ndarray
    shared: np.ndarray
    aux: Aux = dataclasses.field(default_factory=Aux)

    def need(self, *names: str) -> list[Any]:
        """These fields of `aux`. Raises AtomError where one is missing or has not one row per id."""
        out = []
        for name in names:
            value = getattr(self.aux, name)
            if value is None:
                raise AtomError(f"this method needs {name}, which is not given")
            size = self.source.size if name == "source_vectors" else self.target.size
            if name not in ("embed", "hypernet") and len(value) < size:
                raise AtomError(f"{name} has {len(value)} rows, its vocabulary has {size} ids")
            out.append(value)
        return out

    def need_shared(self) -> np.ndarray:
        """`shared`. Raises AtomError where there is none."""
        if not len(self.shared):
            raise AtomError(
                f"{self.source.name} and {self.target.name} share no token, and this method starts from those"
            )
        return self.shared


@dataclasses.dataclass(frozen=True)
class Initialiser:
    """A way to make rows; its fields are its options.

    name: in INITIALISERS. label: of the rows that it makes, in reports. copies: whether rows of shared tokens are
    copied first. needs: fields of `Aux` that it does not work without.
    """

    name: ClassVar[str]
    label: ClassVar[str] = "composed"
    copies: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Rows f32 [m, n, d] for task.new, and bool [m], which of them there are; the others are the fallback's."""
        raise NotImplementedError


def blocks(m: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of `size` that cover m rows."""
    return (slice(i, min(i + size, m)) for i in range(0, m, size))


def planes(donor: np.ndarray, n: int) -> list[np.ndarray]:
    """The donor's plane for each of n planes: its own, or the only one of a tied donor."""
    return [donor[:, min(i, donor.shape[1] - 1)] for i in range(n)]


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., e] of length 1; zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mix(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums [m, ...] of the rows of a table [s, ...] with weights [m, s]."""
    return (weights @ table.reshape(len(table), -1)).reshape(len(weights), *table.shape[1:])


def mix_at(weights: np.ndarray, at: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums [m, ...] of the rows `at` [m, k] of a table [s, ...] with weights [m, k]."""
    return np.einsum("mk,mk...->m...", weights, table[at])


def top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest scores [m, k] of each row of [m, s], in falling order, and where they are."""
    k = min(k, scores.shape[1])
    at = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    found = np.take_along_axis(scores, at, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(at, order, axis=1)


def texts(view: ByteView, ids: Any) -> list[str]:
    """What tokens say, as text; parts of characters become U+FFFD."""
    return [view.pieces.get(int(i), view.special.get(int(i), "").encode()).decode("utf-8", "replace") for i in ids]
