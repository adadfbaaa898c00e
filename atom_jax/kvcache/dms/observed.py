"""The attention that keys receive while they are in the window: the evidence of the `observed` form.

A query's softmax is restricted to the window itself, so what a key receives does not depend on earlier evictions, and
a prompt is observed in one banded pass of O(t * window).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.nn.attention import NEGATIVE, Tokens

TINY = 1e-6


def features(top: jax.Array, total: jax.Array, late: jax.Array) -> jax.Array:
    """Logarithms [..., 3] of the largest, the summed and the recent attention."""
    return jnp.log(TINY + jnp.stack([top, total, late], axis=-1))


def observe(q_bhgtk: jax.Array, k_bhtk: jax.Array, tokens: Tokens, window: int) -> jax.Array:
    """Features float32 [b, h, t, 3] of every key, from the queries i + 1 .. i + window (those that exist)."""
    return features(*received(q_bhgtk, k_bhtk, tokens, tokens, window))


def received(
    q_bhgtk: jax.Array, k_bhsk: jax.Array, q: Tokens, k: Tokens, window: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest, summed and recent attention float32 [b, h, s] that each key receives from queries 1 to `window`
    positions after it; "recent" counts those more than window // 2 after it.

    The last t of the s keys stand where the t queries stand; the s - t before them come first, s - t <= window + 1.
    """
    b, h, _, t, size = q_bhgtk.shape
    s = k_bhsk.shape[2]
    block = window + 1
    before = s - t
    # Query block i sees key blocks i and i + 1 of keys that have exactly one block in front of the first query.
    pad_t = -t % block
    n = (t + pad_t) // block
    front = block - before
    q_bhgtk = jnp.pad(q_bhgtk, [(0, 0)] * 3 + [(0, pad_t), (0, 0)])
    keys = jnp.pad(k_bhsk, [(0, 0)] * 2 + [(front, pad_t), (0, 0)])
    q_pos, q_seg = jnp.pad(q.positions, [(0, 0), (0, pad_t)]), jnp.pad(q.segments, [(0, 0), (0, pad_t)])
    k_pos = jnp.pad(k.positions, [(0, 0), (front, pad_t)])
    k_seg = jnp.pad(k.segments, [(0, 0), (front, pad_t)], constant_values=-1)
    q_seg = jnp.where(q_seg > 0, q_seg, -2)

    def one(i: jax.Array) -> tuple[jax.Array, ...]:
        cut = lambda x, axis, at, size: jax.lax.dynamic_slice_in_dim(x, at, size, axis)  # noqa: E731
        q_i, k_i = cut(q_bhgtk, 3, i * block, block), cut(keys, 2, i * block, 2 * block)
        places = (cut(q_pos, 1, i * block, block), cut(k_pos, 1, i * block, 2 * block))
        distance = places[0][:, :, None] - places[1][:, None]
        same = cut(q_seg, 1, i * block, block)[:, :, None] == cut(k_seg, 1, i * block, 2 * block)[:, None]
        seen = same & (distance >= 0) & (distance <= window)
        scores = jnp.einsum("bhgtk,bhsk->bhgts", q_i, k_i, preferred_element_type=jnp.float32) * size**-0.5
        everyone = jnp.broadcast_to(seen[:, None, None], scores.shape)
        weights = jax.nn.softmax(jnp.where(everyone, scores, NEGATIVE), axis=-1)
        other = (seen & (distance > 0))[:, None, None]
        weights = jnp.where(jnp.broadcast_to(other, scores.shape), weights, 0.0)
        late = (distance > window // 2)[:, None, None].astype(jnp.float32)
        return weights.max((2, 3)), weights.sum((2, 3)), jnp.sum(weights * late, (2, 3))

    parts = jax.lax.map(one, jnp.arange(n))

    def join(x: jax.Array, add) -> jax.Array:
        """[n, b, h, 2 * block] of overlapping key blocks to [b, h, s]."""
        x = x.reshape(n, b, h, 2, block)
        first, second = x[:, :, :, 0], x[:, :, :, 1]
        zero = jnp.zeros_like(first[:1])
        whole = add(jnp.concatenate([first, zero]), jnp.concatenate([zero, second]))
        return jnp.moveaxis(whole, 0, 2).reshape(b, h, -1)[..., front : front + s]

    return join(parts[0], jnp.maximum), join(parts[1], jnp.add), join(parts[2], jnp.add)
