"""Means of entries, for policies that merge what leaves into what stays.

into: i32 [b, h, t], number of the entry that takes up each of the t entries; its own where it stays, t where it is
dropped. slot, gone: i32 [b, h], slots of a layer; past the last one where nothing is written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.kvcache.budget import BudgetLayer, Entries, put

# Weights are at least so large where they are divided by.
TINY = 1e-9


def pooled(entries: Entries, into_bht: jax.Array, weight_bht: jax.Array) -> tuple[Entries, jax.Array, jax.Array]:
    """A prompt's entries, of which those that stay have means of the keys and values that they take up, by weights
    float32 of at least 0; the weight of each of them altogether, and the share of each entry in its mean, float32
    [b, h, t]. What stays alone stays as it is."""
    total = added(weight_bht, into_bht)
    share = weight_bht / jnp.maximum(take(total, jnp.minimum(into_bht, into_bht.shape[2] - 1)), TINY)
    mean = lambda x: added(share[..., None] * x.astype(jnp.float32), into_bht).astype(x.dtype)  # noqa: E731
    return entries.replace(k=mean(entries.k), v=mean(entries.v)), total, share


def added(x: jax.Array, into_bht: jax.Array) -> jax.Array:
    """Sums float32 [b, h, t, ...] of x [b, h, t, ...] over those that each takes up."""
    rows, heads = (jnp.arange(n) for n in into_bht.shape[:2])
    return jnp.zeros(x.shape).at[rows[:, None, None], heads[None, :, None], into_bht].add(x, mode="drop")


def blended(layer: BudgetLayer, slot_bh: jax.Array, gone_bh: jax.Array, share_bh: jax.Array) -> BudgetLayer:
    """The layer in which keys and values at a slot have become means, with this share float32 [b, h] of those at the
    slot `gone`."""
    c = layer.k.shape[2]
    here, there = (jnp.minimum(s, c - 1)[..., None] for s in (slot_bh, gone_bh))

    def mean(x: jax.Array) -> jax.Array:
        old, new = (take(x, i)[:, :, 0].astype(jnp.float32) for i in (here, there))
        return put(x, old + share_bh[..., None] * (new - old), slot_bh)

    return layer.replace(k=mean(layer.k), v=mean(layer.v))


def take(x: jax.Array, at_bhm: jax.Array) -> jax.Array:
    """[b, h, m, ...] of x [b, h, s, ...], at these numbers."""
    return jnp.take_along_axis(x, at_bhm if x.ndim == 3 else at_bhm[..., None], axis=2)


def unit(k_bhsk: jax.Array) -> jax.Array:
    """Keys float32, divided by their norms."""
    k = k_bhsk.astype(jnp.float32)
    return k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
