"""KVMerger (Wang et al., 2024): tokens of a prompt whose keys are like those of their neighbours become one entry."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import merging
from atom_jax.kvcache.budget import FAR, BudgetLayer, Entries, keep_largest, tied
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.merging import take


@config.register
@dataclasses.dataclass(frozen=True)
class KVMerger(H2O):
    """Neighbours in a prompt whose keys, as they are rotated, have a cosine above `threshold` form a set, and a set
    becomes one entry, in the place of its member that received most attention: means of keys and values by weights
    exp(-d^2 / 2 sigma^2), d: how far a key is from that member's. In no set are the newest third of the
    limit, the fourth of it that received most attention, and the `sinks` first tokens. Only as many tokens are merged
    as the limit asks for, those that are most like their neighbours first; where all sets are too few, entries leave
    by their attention, as in H2O. So does an entry for each later token: it is merged likewise into the one of the
    two entries next to it that is more like it, if their cosine is above the threshold, and that entry neither a sink
    nor one of the newest; else it is dropped.

    No code of the authors was at hand: sets, weights and the threshold are as others' code and reviews of the paper
    give them, and the third and the fourth as these quote its shares for half a cache. There nothing is said of a
    limit that is kept to, nor of later tokens; sigma is defined by the weights that follow from it, and 5 is the best
    fixed one.
    """

    name: ClassVar[str] = "kvmerger"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"threshold": (0.0, 1.0), "sigma": (1e-6, 1e6)}
    threshold: float = 0.75
    sigma: float = 5.0

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """A third of the limit."""
        return limit_bh // 3

    def compact(
        self, layer: BudgetLayer, entries: Entries, length_b: jax.Array, limit_bh: jax.Array
    ) -> tuple[BudgetLayer, Entries, jax.Array, jax.Array]:
        """Sets become entries."""
        into, t = self._sets(entries, length_b - 1, limit_bh), entries.pos.shape[2]
        pivot = take(entries.k, jnp.minimum(into, t - 1))
        keep = into == jax.lax.broadcasted_iota(jnp.int32, into.shape, 2)
        return layer, merging.pooled(entries, into, self._weight(entries.k, pivot))[0], keep, limit_bh

    def _sets(self, entries: Entries, last_b: jax.Array, limit_bh: jax.Array) -> jax.Array:
        """i32 [b, h, t]: for each of a prompt's entries, that which stands for its set; t where none does."""
        t, held = entries.pos.shape[2], entries.pos >= 0
        place = jax.lax.broadcasted_iota(jnp.int32, entries.pos.shape, 2)
        score, order = self.guarded(entries, last_b, limit_bh), self.order(entries.pos)
        apart = keep_largest(score, order, jnp.sum(score == jnp.inf, axis=-1) + limit_bh // 4, self.digits)
        free, key = held & ~apart, merging.unit(entries.k)
        u = jnp.pad(jnp.sum(key[:, :, 1:] * key[:, :, :-1], axis=-1), ((0, 0), (0, 0), (1, 0)))
        links = free & jnp.pad(free[..., :-1], ((0, 0), (0, 0), (1, 0))) & self._above(u)
        joined = keep_largest(jnp.where(links, u, -jnp.inf), place, held.sum(-1) - limit_bh, self.digits)
        number = jnp.cumsum(~joined, axis=-1, dtype=jnp.int32) - 1
        rows, heads = (jnp.arange(n) for n in limit_bh.shape)
        at = rows[:, None, None], heads[None, :, None], number
        best = take(jnp.full(score.shape, -jnp.inf).at[at].max(score), number)
        likely = jnp.where(tied(score, best, self.digits), place, -1)
        pivot = take(jnp.full(score.shape, -1).at[at].max(likely), number)
        stays = keep_largest(jnp.where(pivot == place, score, -jnp.inf), order, limit_bh, self.digits)
        return jnp.where(take(stays, pivot), pivot, t)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """One joins an entry next to it, or none."""
        pos, c = layer.pos, layer.pos.shape[2]
        gone = jnp.minimum(slot_bh, c - 1)[..., None]
        score = self.guarded(layer.entries, pos.max((1, 2)), layer.limit)
        here = take(pos, gone)
        before = jnp.argmax(jnp.where(pos < here, pos, -1), axis=-1)
        after = jnp.argmin(jnp.where(pos > here, pos, FAR), axis=-1)
        near = jnp.stack([before, after], axis=-1)
        beside = jnp.stack([take(pos, near)[..., 0] < here[..., 0], take(pos, near)[..., 1] > here[..., 0]], axis=-1)
        free = beside & jnp.isfinite(take(score, near))
        k, key = take(layer.k, near), take(layer.k, gone)
        u = jnp.where(free, jnp.sum(merging.unit(k) * merging.unit(key), axis=-1), -jnp.inf)
        best = u.max(-1, keepdims=True)
        one = jnp.argmax(tied(u, best, self.digits), axis=-1)[..., None]
        weight = self._weight(key, take(k, one))[..., 0]
        into = jnp.where(live_bh & self._above(best)[..., 0], take(near, one)[..., 0], c)
        return merging.blended(layer, into, slot_bh, weight / (1.0 + weight))

    def _above(self, u: jax.Array) -> jax.Array:
        """Whether cosines are above the threshold, and not as good as equal to it."""
        return (u > self.threshold) & ~tied(u, jnp.float32(self.threshold), self.digits)

    def _weight(self, k: jax.Array, pivot: jax.Array) -> jax.Array:
        """float32 [b, h, m]: weights of keys [b, h, m, k] next to those of their pivots."""
        apart = k.astype(jnp.float32) - pivot.astype(jnp.float32)
        return jnp.exp(jnp.sum(apart**2, axis=-1) / (-2.0 * self.sigma**2))
