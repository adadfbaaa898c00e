"""KeyDiff (Park et al., 2025): keys that differ from the others stay."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import merging
from atom_jax.kvcache.budget import Budget, BudgetLayer, Entries
from atom_jax.kvcache.layer import Call


@config.register
@dataclasses.dataclass(frozen=True)
class KeyDiff(Budget):
    """Score: minus the cosine between the key and the mean of all stored keys, each divided by its norm. A step reads
    all keys a second time."""

    name: ClassVar[str] = "keydiff"

    def observe(self, entries: Entries, call: Call) -> jax.Array:
        """Scores of all entries among each other."""
        return _difference(entries.k, entries.pos)

    def step(self, layer: BudgetLayer, weights_bhgc: jax.Array) -> jax.Array:
        """Scores of all entries among each other."""
        return _difference(layer.k, layer.pos)


def _difference(k_bhsk: jax.Array, pos_bhs: jax.Array) -> jax.Array:
    unit = merging.unit(k_bhsk)
    held = (pos_bhs >= 0).astype(jnp.float32)
    mean = jnp.einsum("bhsk,bhs->bhk", unit, held) / jnp.maximum(held.sum(-1), 1.0)[..., None]
    mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return -jnp.einsum("bhsk,bhk->bhs", unit, mean)
