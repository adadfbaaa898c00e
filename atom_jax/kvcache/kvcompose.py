"""KVCompose (Akulov et al., 2025): a prompt is read twice, and layers share what the second reading attended to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, BudgetLayer, Entries, keep_largest
from atom_jax.kvcache.layer import Call, Sizes


@config.register
@dataclasses.dataclass(frozen=True)
class KVCompose(Budget):
    """budget and ratio are means over layers (and heads). Score: the largest attention that a query of the second
    reading pays to the key, averaged over the group, plus the mean of that over the heads of the layer.

    structured: all heads of a layer keep equally many: layers compete with the means over their heads of the j-th
      largest scores; otherwise every head competes for itself. At least one entry stays everywhere.
    norms: scores are multiplied by the norms of values. first: the first layer competes with the largest means of all
      layers, as kvpress has it. Later tokens are stored as in SnapKV. Twice the prompt is held while it is read.
    """

    name: ClassVar[str] = "kvcompose"
    passes: ClassVar[int] = 2
    shrinks: ClassVar[bool] = True
    structured: bool = True
    norms: bool = False
    first: bool = False

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Everything, until it is settled what stays."""
        return capacity

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Everything, so far."""
        return entries.pos >= 0, limit_bh

    def reread(self, entries: Entries, call: Call) -> jax.Array:
        """The score."""
        c = entries.pos.shape[2] - call.k.shape[2]
        most = observe.received(call.q, call.tokens, entries.k, entries.pos, False, None, call.window, most=True)
        score = most[..., :c].mean(2)
        if self.norms:
            score *= jnp.linalg.norm(entries.v[:, :, :c].astype(jnp.float32), axis=-1)
        return score + jnp.broadcast_to(score.mean(1, keepdims=True), score.shape)

    def settle(self, layers: BudgetLayer, length_b: jax.Array) -> BudgetLayer:
        """Every head keeps its largest scores, as many as its layer (or it alone) is given."""
        n, b, h, c = layers.pos.shape
        score = jnp.where(layers.pos < 0, -jnp.inf, jnp.where(layers.pos < self.sinks, jnp.inf, layers.score))
        best = -jnp.sort(-score, axis=-1)
        best = best.mean(2) if self.structured else jnp.moveaxis(best, 2, 1).reshape(n * h, b, c)
        if self.first and self.structured:
            best = best.at[0].set(best.max(0))
        best = jnp.moveaxis(best, 1, 0)
        total = self._total(length_b, best.shape[1], c)
        # Of equal means the later layer's count, as they do in kvpress, where the first layer has others' means.
        places = jnp.broadcast_to(jnp.arange(best[0].size)[None], (b, best[0].size))
        taken = keep_largest(best.reshape(b, -1), places, total, self.digits).reshape(best.shape)
        count = jnp.maximum(taken.sum(-1, dtype=jnp.int32), 1)
        count = count.T[..., None] if self.structured else jnp.moveaxis(count.reshape(b, n, h), 1, 0)
        count = jnp.broadcast_to(count, (n, b, h))
        keep = keep_largest(score, self.order(layers.pos), count, self.digits)
        new = jax.vmap(lambda layer, keep: layer._put(layer.entries, keep))(layers, keep)
        enough = (length_b[None, :, None] <= layers.limit) if self.budget else jnp.zeros(count.shape, bool)
        return new.replace(limit=self.later(jnp.where(enough, layers.limit, count)))

    def _total(self, length_b: jax.Array, lists: int, longest: int) -> jax.Array:
        """i32 [b]: entries of all `lists` (layers, or their heads) together."""
        if self.budget:
            return jnp.minimum(self.budget, length_b) * lists
        table = np.floor(np.arange(longest + 1) * lists * self.ratio + 1e-9).astype(np.int32)
        return jnp.asarray(table)[length_b]
