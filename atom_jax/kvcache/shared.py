"""Facts need their tokens everywhere at once: a choice that all layers and heads share (ours)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, BudgetLayer, Entries, keep_largest
from atom_jax.kvcache.lasting.score import middle
from atom_jax.kvcache.memory import Call, Sizes


@config.register
@dataclasses.dataclass(frozen=True)
class Shared(Budget):
    """A token of a prompt stays in all layers and heads, or in none. Score: the largest attention that a later query
    of the prompt pays to it (any query of the group), averaged over the heads of the layers that find again what was
    read (`lasting.score.middle`): the score "observed" of lasting memories.

    window: the newest tokens, which stay. Later tokens are stored at the cost of the prompt's, in all layers and
    heads of the same ones. The whole prompt is held while it is read.
    """

    name: ClassVar[str] = "shared"
    shrinks: ClassVar[bool] = True
    sinks: int = 4
    window: int = 64

    def __post_init__(self):
        super().__post_init__()
        config.check(self, window=(0, 2**24))

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Everything, until it is settled what stays."""
        return capacity

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """The window."""
        return jnp.full_like(limit_bh, self.window)

    def prompt(self, entries: Entries, call: Call) -> jax.Array:
        """The largest weight from a later query."""
        most = observe.received(
            call.q, call.tokens, entries.k, entries.pos, call.fresh, None, call.window, most=True, after=1
        )
        return most.max(2)

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Everything, so far."""
        return entries.pos >= 0, limit_bh

    def settle(self, layers: BudgetLayer, length_b: jax.Array) -> BudgetLayer:
        """All layers and heads keep the tokens of largest mean score."""
        mean = layers.score[middle(len(layers.score))].mean((0, 2))
        shape = layers.pos.shape
        layers = layers.replace(score=jnp.broadcast_to(mean[None, :, None], shape))
        limit_b = self.share(length_b, shape[3]) if self.ratio else jnp.full_like(length_b, self.budget)
        limit = jnp.broadcast_to(limit_b[:, None], shape[1:3])

        def of(layer: BudgetLayer) -> BudgetLayer:
            score = self.guarded(layer.entries, length_b - 1, limit)
            return layer._put(layer.entries, keep_largest(score, self.order(layer.pos), limit))

        return jax.vmap(of)(layers).replace(limit=jnp.broadcast_to(self.later(limit)[None], shape[:3]))
