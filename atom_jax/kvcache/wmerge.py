"""Weighted merging (ours): what H2O evicts joins the nearest entry that stays."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import merging
from atom_jax.kvcache.budget import FAR, BudgetLayer, Entries, put
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.merging import TINY, take


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
        place = jax.lax.broadcasted_iota(jnp.int32, keep.shape, 2)
        before = jax.lax.cummax(jnp.where(keep, place, -FAR), axis=2)
        after = jax.lax.cummin(jnp.where(keep, place, FAR), axis=2, reverse=True)
        nearest = jnp.where(place - before <= after - place, before, after)
        into = jnp.where(entries.pos >= 0, nearest, keep.shape[2])
        weight = jnp.where(entries.pos >= 0, jnp.maximum(entries.score, TINY), 0.0)
        new, total, share = merging.pooled(entries, into, weight)
        bias = merging.added(share * (entries.bias - jnp.log(jnp.maximum(share, TINY))), into)
        return layer, new.replace(score=total, bias=bias)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """One goes to the nearest."""
        c = layer.k.shape[2]
        gone = jnp.minimum(slot_bh, c - 1)[..., None]
        distance = layer.pos - take(layer.pos, gone)
        others = (layer.pos >= 0) & (distance != 0)
        into = jnp.argmin(jnp.where(others, 2 * jnp.abs(distance) + (distance > 0), FAR), axis=-1)[..., None]
        old, new = (jnp.maximum(take(layer.score, i)[..., 0], TINY) for i in (into, gone))
        share = jnp.minimum(new / (old + new), 1.0 - 1e-6)
        here, there = (take(layer.bias, i)[..., 0] for i in (into, gone))
        mean = (1.0 - share) * here + share * there
        bias = mean - share * jnp.log(share) - (1.0 - share) * jnp.log1p(-share)
        # Past the end, where nothing is written, where nothing leaves.
        place = jnp.where(live_bh & others.any(-1), into[..., 0], c)
        layer = merging.blended(layer, place, slot_bh, share)
        return layer.replace(score=put(layer.score, old + new, place), bias=put(layer.bias, bias, place))
