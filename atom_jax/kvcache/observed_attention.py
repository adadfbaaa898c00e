"""Observed attention: H2O's evidence as a mean, with nothing reserved for the newest entries (as kvpress has it)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import Entries
from atom_jax.kvcache.h2o import H2O


@config.register
@dataclasses.dataclass(frozen=True)
class ObservedAttention(H2O):
    """Score: attention received by the key, per query that could see it, and summed over the heads of the group."""

    name: ClassVar[str] = "observed_attention"

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """Nothing is reserved."""
        return jnp.zeros_like(limit_bh)

    def guarded(self, entries: Entries, last_b: jax.Array, limit_bh: jax.Array) -> jax.Array:
        """Sums become means: the key at p was seen by the queries from p to `last`."""
        queries = jnp.maximum(last_b[:, None, None] - entries.pos + 1, 1)
        return super().guarded(entries.replace(score=entries.score / queries), last_b, limit_bh)
