"""Cache merging (Zhang et al., 2024, "CaM"): the value of what leaves is spread over the entries after it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import BudgetLayer, Entries, tied
from atom_jax.kvcache.h2o import H2O
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class CaM(H2O):
    """The `sinks` first entries and the newest stay, as in StreamingLLM. While single tokens follow, a `spread`-th
    part of the value of the entry that leaves is added to the values of each of the `spread` entries after it, if it
    received more attention so far than the entries on average; keys stay as they are.

    That is the released code; the paper draws whether it is added, with the quotient of both as its probability. The
    attention of a group's query heads is added up here.
    """

    name: ClassVar[str] = "cam"
    sinks: int = 4
    spread: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.spread < 1:
            raise AtomError(f"memory {self.name}: expected spread of at least 1, got {self.spread}")

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """None in particular: `guarded` says it."""
        return jnp.zeros_like(limit_bh)

    def guarded(self, entries: Entries, last_b: jax.Array, limit_bh: jax.Array) -> jax.Array:
        """The newest have the largest."""
        position = entries.pos.astype(jnp.float32)
        return super().guarded(entries.replace(score=position), last_b, limit_bh)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """Spreads the value of the entry that leaves."""
        gone = jnp.minimum(slot_bh, layer.k.shape[2] - 1)[..., None]
        held = layer.pos >= 0
        score = jnp.where(held, layer.score, 0.0)
        mean = score.sum(-1, keepdims=True) / jnp.maximum(held.sum(-1, keepdims=True), 1)
        distance = layer.pos - jnp.take_along_axis(layer.pos, gone, axis=2)
        received = jnp.take_along_axis(layer.score, gone, axis=2)
        merged = live_bh[..., None] & (received > mean) & ~tied(received, mean, self.digits)
        after = held & (distance > 0) & (distance <= self.spread) & merged
        value = jnp.take_along_axis(layer.v, gone[..., None], axis=2) / self.spread
        return layer.replace(v=layer.v + jnp.where(after[..., None], value, 0.0).astype(layer.v.dtype))
