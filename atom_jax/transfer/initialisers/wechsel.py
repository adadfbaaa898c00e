"""WECHSEL: a token's row is a mean of those of its nearest source tokens among static word vectors of both languages,
turned into one space (Minixhofer et al., 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from atom_jax import config
from atom_jax.transfer.initialisers.base import Initialiser, Task, blocks, mix_at, softmax, top, unit
from atom_jax.transfer.initialisers.landmarks import rotation


@dataclasses.dataclass(frozen=True)
class Wechsel(Initialiser):
    """Needs `source_vectors` and `target_vectors`: see `token_vectors`, `aligned`.

    neighbours, temperature: of the nearest source tokens, softmax(cosine / temperature). As in the paper, ordinary
    tokens with the same bytes are not copied.
    """

    name: ClassVar[str] = "wechsel"
    label: ClassVar[str] = "interpolated"
    needs: ClassVar[tuple[str, ...]] = ("source_vectors", "target_vectors")
    copies: ClassVar[bool] = False
    neighbours: int = 10
    temperature: float = 0.1

    def __post_init__(self):
        config.check(self, neighbours=(1, 10_000), temperature=(1e-6, 1e6))

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        theirs, ours = task.need(*self.needs)
        known = np.flatnonzero(np.abs(theirs[: len(task.table)]).sum(1) > 0)
        found = np.abs(ours[task.new]).sum(1) > 0
        found &= len(known) > 0
        out = np.zeros((len(task.new), *task.table.shape[1:]), np.float32)
        rows, points = np.flatnonzero(found), unit(theirs[known])
        for part in blocks(len(rows)):
            at, weights = self.weigh(unit(ours[task.new[rows[part]]]), points)
            out[rows[part]] = mix_at(weights, known[at], task.table)
        return out, found

    def weigh(self, x: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest points [m, k] of each vector of x [m, e], all of length 1, and their weights."""
        near, at = top(x @ points.T, self.neighbours)
        return at, softmax(near / self.temperature)


def aligned(source: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Vectors [v, e] of the source language in the space of the target language, turned by the rotation that fits
    pairs of vectors (source, target) of words that translate each other best."""
    a, b = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return source @ rotation(a, b)


def token_vectors(tokenizer: Any, words: Mapping[str, np.ndarray], counts: Mapping[str, float]) -> np.ndarray:
    """f32 [ids, e]: for each token the mean of the vectors of all words that it is a part of, with a space in front
    or without, weighted by how often the words occur (1 where that isn't known); zeros where there is none."""
    width = len(next(iter(words.values())))
    total, weight = np.zeros((tokenizer.vocab_size, width), np.float64), np.zeros(tokenizer.vocab_size)
    for word, vector in words.items():
        for text in (word, f" {word}"):
            ids = np.unique(tokenizer.encode(text))
            total[ids] += counts.get(word, 1.0) * vector
            weight[ids] += counts.get(word, 1.0)
    return (total / np.maximum(weight, 1e-30)[:, None]).astype(np.float32)


def pairs_of(
    dictionary: Sequence[tuple[str, str]], source: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Vectors of the pairs of a bilingual dictionary that both languages have, each as it is, in lower case and with
    a capital."""
    forms = (str, str.lower, str.title)
    found = {(form(a), form(b)) for a, b in dictionary for form in forms}
    return [(source[a], target[b]) for a, b in sorted(found) if a in source and b in target]
