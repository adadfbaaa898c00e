"""Weighted merging (ours): what H2O evicts joins the nearest entry that stays."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import FAR, BudgetLayer, Entries
from atom_jax.kvcache.h2o import H2O

# Attention of an entry that received none.
TINY = 1e-9


@config.register
@dataclasses.dataclass(frozen=True)
class WMerge(H2O):
    """Scores and what leaves as in H2O. An entry that leaves is merged into the one that is nearest by position (the
    earlier of two): keys, as they are rotated, and values become means by the attention received, which adds up, and
    the entropy of these weights is added to the entry's scores: the logarithm of how many tokens it stands for, where
    they weigh the same."""

    name: ClassVar[str] = "wmerge"
    biased: ClassVar[bool] = True

    def gather(self, layer: BudgetLayer, entries: Entries, keep: jax.Array) -> tuple[BudgetLayer, Entries]:
        """Each goes to the nearest that stays."""
        b, h, t = keep.shape
        place = jax.lax.broadcasted_iota(jnp.int32, keep.shape, 2)
        before = jax.lax.cummax(jnp.where(keep, place, -FAR), axis=2)
        after = jax.lax.cummin(jnp.where(keep, place, FAR), axis=2, reverse=True)
        nearest = jnp.where(place - before <= after - place, before, after)
        into = jnp.where(entries.pos >= 0, nearest, t)
        at = jnp.arange(b)[:, None, None], jnp.arange(h)[None, :, None], into
        # Weights are at most 1, and 1 where nothing joins: what stays alone stays as it is.
        weight = jnp.where(entries.pos >= 0, jnp.maximum(entries.score, TINY), 0.0)
        total = jnp.zeros((b, h, t + 1)).at[at].add(weight, mode="drop")
        share = weight / jnp.maximum(jnp.take_along_axis(total, jnp.minimum(into, t), axis=2), TINY)
        added = lambda x: jnp.zeros((b, h, t, *x.shape[3:])).at[at].add(x, mode="drop")  # noqa: E731
        k, v = (added(share[..., None] * x.astype(jnp.float32)).astype(x.dtype) for x in (entries.k, entries.v))
        bias = added(share * (entries.bias - jnp.log(jnp.maximum(share, TINY))))
        return layer, entries.replace(k=k, v=v, score=total[..., :t], bias=bias)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """One goes to the nearest."""
        c = layer.k.shape[2]
        gone = jnp.minimum(slot_bh, c - 1)[..., None]
        distance = layer.pos - _take(layer.pos, gone)
        others = (layer.pos >= 0) & (distance != 0)
        into = jnp.argmin(jnp.where(others, 2 * jnp.abs(distance) + (distance > 0), FAR), axis=-1)[..., None]
        live = live_bh[..., None] & others.any(-1, keepdims=True)
        old, new = jnp.maximum(_take(layer.score, into), TINY), jnp.maximum(_take(layer.score, gone), TINY)
        share = jnp.minimum(new / (old + new), 1.0 - 1e-6)
        mean = (1.0 - share) * _take(layer.bias, into) + share * _take(layer.bias, gone)
        bias = mean - share * jnp.log(share) - (1.0 - share) * jnp.log1p(-share)
        rows, heads = (jnp.arange(n) for n in slot_bh.shape)
        # Past the end, where nothing is written, where nothing leaves.
        place = rows[:, None], heads[None], jnp.where(live, into, c)[..., 0]

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return x.at[place].set(new[:, :, 0].astype(x.dtype), mode="drop", unique_indices=True)

        def mixed(x: jax.Array) -> jax.Array:
            here, there = (_take(x, i[..., None]).astype(jnp.float32) for i in (into, gone))
            return put(x, here + share[..., None] * (there - here))

        score, bias = put(layer.score, old + new), put(layer.bias, bias)
        return layer.replace(k=mixed(layer.k), v=mixed(layer.v), score=score, bias=bias)


def _take(x: jax.Array, at: Any) -> jax.Array:
    return jnp.take_along_axis(x, at, axis=2)
