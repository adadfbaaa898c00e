"""D2O (Wan et al., 2024): what leaves joins the entry that is most like it, or is dropped where none is like enough;
layers whose attention varies less keep more."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import merging
from atom_jax.kvcache.budget import FAR, BudgetLayer, Entries, tied
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.layer import Sizes
from atom_jax.kvcache.merging import take
from atom_jax.kvcache.observe import ROWS


@config.register
@dataclasses.dataclass(frozen=True)
class D2O(H2O):
    """Scores and what leaves as in H2O; the `sinks` first tokens stay. An entry that leaves is merged into the one of
    its head whose key is most like its own, by the cosine u of both as they are rotated, if u reaches the threshold
    of the head; else it is dropped. The threshold is the mean u of what leaves the prompt; each entry that leaves
    later moves it, by the part `smoothing` of the way, to its own u. Keys and values become means, in which what
    joins weighs exp(u) and the entry itself e.

    budget and ratio are means over layers: of what all have together, a layer gets the part softmax(-f). f: the
    variance, over the prompt's tokens, of the attention that they received, stretched so that it is 0 in the head of
    the layer with the least and 1 in the one with the largest, and averaged over the heads: with two heads, or one,
    all layers get the same. The whole prompt is held while it is read.

    The weights and the threshold are the paper's, as others' code quotes its equations; f is the released code's.
    That differs in the rest: what joins weighs u and the entry 1; keys are held for every query head, and the mean u
    over these decides what is merged; the first two layers and the last stay whole (here:
    "d2o:budget=512;0=none;1=none").
    """

    name: ClassVar[str] = "d2o"
    shrinks: ClassVar[bool] = True
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"smoothing": (0.0, 1.0)}
    sinks: int = 4
    smoothing: float = 0.7

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> BudgetLayer:
        """Empty buffers; extra: thresholds float32 [b, h], -inf where nothing has left yet."""
        nothing = jnp.full((len(numbers), sizes.b, sizes.h), -jnp.inf)
        return super().init(sizes, capacity, numbers).replace(extra=nothing)

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Everything, until it is settled what stays."""
        return capacity

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Everything, so far."""
        return entries.pos >= 0, limit_bh

    def settle(self, layers: BudgetLayer, length_b: jax.Array) -> BudgetLayer:
        """Every layer keeps as many as it is given."""

        def compacted(one: tuple[BudgetLayer, jax.Array]) -> BudgetLayer:
            layer, limit = one[0], jnp.broadcast_to(one[1][:, None], one[0].limit.shape)
            keep, _ = super(D2O, self).choose(layer.entries, length_b, limit)
            return self._merged(layer, keep).replace(limit=self.later(limit))

        return jax.lax.map(compacted, (layers, self.limits(layers, length_b)))

    def limits(self, layers: BudgetLayer, length_b: jax.Array) -> jax.Array:
        """i32 [n, b]: entries for each of the n layers, by the scores of prompts of these lengths."""
        held = layers.pos >= 0
        count = held.sum(-1)
        mean = jnp.where(held, layers.score, 0.0).sum(-1) / jnp.maximum(count, 1)
        apart = jnp.where(held, layers.score - mean[..., None], 0.0)
        variance = jnp.sum(apart**2, axis=-1) / jnp.maximum(count - 1, 1)
        low, high = variance.min(-1, keepdims=True), variance.max(-1, keepdims=True)
        same = tied(low, high, self.digits)
        f = jnp.where(same, 0.0, (variance - low) / jnp.where(same, 1.0, high - low)).mean(-1)
        given = self.share(length_b, layers.pos.shape[-1]) if self.ratio else jnp.full_like(length_b, self.budget)
        limit = jnp.round(given[None] * len(f) * jax.nn.softmax(-f, axis=0)).astype(jnp.int32)
        return jnp.maximum(jnp.minimum(limit, length_b[None]) if self.ratio else limit, 1)

    def _merged(self, layer: BudgetLayer, keep: jax.Array) -> BudgetLayer:
        """The layer with the entries to keep, bool [b, h, c], which take up others."""
        entries, held, c = layer.entries, layer.pos >= 0, layer.pos.shape[2]
        place = jax.lax.broadcasted_iota(jnp.int32, keep.shape, 2)
        # No layer's part is e times that of another.
        most = min(c, math.ceil(math.e * (self.budget or c * self.ratio)) + 1)
        stays = jnp.argsort(jnp.where(keep, layer.pos, FAR), axis=-1)[..., :most]
        at, key = jnp.where(take(keep, stays), take(layer.pos, stays), -1), merging.unit(layer.k)
        others = take(key, stays)

        def one(k_bhk: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.tree.map(lambda x: x[..., 0], self._nearest(k_bhk[:, :, None], others, at))

        u, slot = (jnp.moveaxis(x, 0, 2) for x in jax.lax.map(one, jnp.moveaxis(key, 2, 0), batch_size=ROWS))
        gone = held & ~keep
        count = gone.sum(-1)
        threshold = jnp.where(gone, u, 0.0).sum(-1) / jnp.maximum(count, 1)
        threshold = jnp.where(count > 0, threshold, -jnp.inf)
        joins = gone & self._reaches(u, threshold[..., None])
        into = jnp.where(keep, place, jnp.where(joins, take(stays, slot), c))
        new = merging.pooled(entries, into, jnp.where(keep, math.e, jnp.exp(u)))[0]
        return layer._put(new, keep).replace(extra=threshold)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """One joins the nearest, or none. Reads all keys a second time."""
        c = layer.pos.shape[2]
        gone = jnp.minimum(slot_bh, c - 1)[..., None]
        at = jnp.where(jnp.arange(c)[None, None] == gone, -1, layer.pos)
        key = merging.unit(layer.k)
        u, into = (x[..., 0] for x in self._nearest(take(key, gone), key, at))
        live = live_bh & jnp.any(at >= 0, axis=-1)
        moved = jnp.where(layer.extra > -jnp.inf, layer.extra + self.smoothing * (u - layer.extra), u)
        threshold = jnp.where(live, moved, layer.extra)
        into = jnp.where(live & self._reaches(u, threshold), into, c)
        share = jnp.exp(u) / (jnp.exp(u) + math.e)
        return merging.blended(layer, into, slot_bh, share).replace(extra=threshold)

    def _nearest(self, k_bhmk: jax.Array, k_bhsk: jax.Array, pos_bhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest cosine float32 [b, h, m] of each of m keys with those of s entries (-1 in pos: none there), and
        the number of that entry, i32; the earliest of equals. All keys are divided by their norms."""
        u = jnp.einsum("bhmk,bhsk->bhms", k_bhmk, k_bhsk, preferred_element_type=jnp.float32)
        pos = jnp.broadcast_to(pos_bhs[:, :, None], u.shape)
        u = jnp.where(pos < 0, -jnp.inf, u)
        best = u.max(-1)
        equal = (pos >= 0) & tied(jnp.exp(u), jnp.exp(best)[..., None], self.digits)
        return best, jnp.argmin(jnp.where(equal, pos, FAR), axis=-1)

    def _reaches(self, u: jax.Array, threshold: jax.Array) -> jax.Array:
        """Whether similarities are at least a threshold, but for rounding."""
        return (u >= threshold) | tied(jnp.exp(u), jnp.exp(threshold), self.digits)
