"""H2O (Zhang et al., 2023): heavy hitters, which received most attention so far, and the newest tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, BudgetLayer, Entries
from atom_jax.kvcache.layer import Call


@config.register
@dataclasses.dataclass(frozen=True)
class H2O(Budget):
    """Score: attention received from all queries so far and all query heads of the group. Half of the limit (rounded
    down) belongs to the newest entries."""

    name: ClassVar[str] = "h2o"

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """Half of the limit."""
        return limit_bh // 2

    def token_score(self, call: Call) -> jax.Array:
        """Nothing yet: the token attends to itself in the same call."""
        return jnp.zeros(call.k.shape[:3])

    def observe(self, entries: Entries, call: Call) -> jax.Array:
        """Adds the attention of all new queries."""
        bias = None if call.fresh else entries.bias
        got = observe.received(call.q, call.tokens, entries.k, entries.pos, call.fresh, bias, call.window)
        return entries.score + got.sum(2)

    def step(self, layer: BudgetLayer, weights_bhgc: jax.Array) -> jax.Array:
        """Adds the attention of this step."""
        return layer.score + weights_bhgc.sum(2)
