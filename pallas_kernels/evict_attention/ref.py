"""What `evict_attention` computes, in jnp: rows of queries at a time against all keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NEGATIVE

# A query whose best score is lower than this sees nothing: every key is masked or was evicted outright.
NOTHING = -1e29
ROWS = 256


def attention(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    keep_bhs: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    start_b: jax.Array,
    window: int | None,
    keep_window: int,
) -> tuple[jax.Array, jax.Array]:
    """`api.evict_attention` for queries of which the first stands at start_b, i32 [b]. Linear memory in t and s."""
    t = q_bhgtk.shape[3]
    rows = min(ROWS, t)
    more = -t % rows
    q = jnp.pad(q_bhgtk, [(0, 0)] * 3 + [(0, more), (0, 0)])
    q_seg = None if segments is None else jnp.pad(segments[0], [(0, 0), (0, more)])

    @jax.checkpoint
    def some(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows)
        near = None if segments is None else (cut(q_seg, axis=1), segments[1])
        return dense(cut(q, axis=3), k_bhsk, v_bhsk, keep_bhs, near, start_b + i * rows, window, keep_window)

    out, lse = jax.lax.map(some, jnp.arange(q.shape[3] // rows))
    out, lse = jnp.moveaxis(out, 0, 3), jnp.moveaxis(lse, 0, 3)
    return out.reshape(q.shape)[:, :, :, :t], lse.reshape(q.shape[:4])[:, :, :, :t]


def dense(q_bhgtk, k_bhsk, v_bhsk, keep_bhs, segments, start_b, window, keep_window):
    """The same with all scores at once."""
    t, s = q_bhgtk.shape[3], k_bhsk.shape[2]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bhgtk,bhsk->bhgts", q_bhgtk, k_bhsk) * q_bhgtk.shape[4] ** -0.5
    distance = (start_b[:, None] + jnp.arange(t)[None])[:, :, None] - jnp.arange(s)[None, None]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if segments is not None:
        q_seg = segments[0][:, :, None]
        seen &= (q_seg == segments[1][:, None, :]) & (q_seg > 0)
    if keep_bhs is not None:
        far = (distance > keep_window)[:, None]
        keep = jnp.maximum(keep_bhs.astype(jnp.float32), NEGATIVE)
        scores += jnp.where(far, keep[:, :, None], 0.0)[:, :, None]
    scores = jnp.where(jnp.broadcast_to(seen[:, None, None], scores.shape), scores, NEGATIVE)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1), NOTHING))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = product("bhgts,bhsk->bhgtk", weights.astype(v_bhsk.dtype), v_bhsk)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEGATIVE)
    return out.astype(q_bhgtk.dtype), lse
