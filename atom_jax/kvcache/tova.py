"""TOVA (Oren et al., 2024, "Transformers are multi-state RNNs"): what the latest token attends to stays."""

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
class TOVA(Budget):
    """Score: the attention of the latest query, averaged over all query heads of the layer, so that all heads keep
    the same tokens. The latest token itself stays."""

    name: ClassVar[str] = "tova"

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """The latest token."""
        return jnp.ones_like(limit_bh)

    def token_score(self, call: Call) -> jax.Array:
        """Nothing yet: the token attends to itself in the same call."""
        return jnp.zeros(call.k.shape[:3])

    def observe(self, entries: Entries, call: Call) -> jax.Array:
        """Attention of the last query."""
        q, at = observe.last_queries(call, 1)
        weights = observe.weights(q, at, entries.k, entries.pos, entries.bias, call.window)
        return _over_heads(weights[..., 0, :])

    def step(self, layer: BudgetLayer, weights_bhgc: jax.Array) -> jax.Array:
        """Attention of the query of this step."""
        return _over_heads(weights_bhgc)


def _over_heads(weights_bhgs: jax.Array) -> jax.Array:
    mean = weights_bhgs.mean((1, 2))[:, None]
    return jnp.broadcast_to(mean, (*weights_bhgs.shape[:2], weights_bhgs.shape[3]))
