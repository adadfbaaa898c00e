"""What `cache_attention` means."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NEGATIVE


def cache_attention(
    q_rgk: jax.Array,
    k_pck: jax.Array,
    v_pck: jax.Array,
    lengths_r: jax.Array,
    table_rn: jax.Array,
    k_scale_p1c: jax.Array | None = None,
    v_scale_p1c: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """f32 [r, g, k] and log-sum-exp f32 [r, g] of rows that hold the first lengths_r entries of pages table_rn."""
    r, n = table_rn.shape
    c, size = k_pck.shape[1:]

    def entries(x_pck: jax.Array, scale_p1c: jax.Array | None) -> jax.Array:
        x = x_pck[table_rn].reshape(r, n * c, size)
        if scale_p1c is None:
            return x.astype(q_rgk.dtype)
        return (x * scale_p1c[table_rn].reshape(r, n * c, 1)).astype(q_rgk.dtype)

    scores = jnp.einsum("rgk,rsk->rgs", q_rgk, entries(k_pck, k_scale_p1c), preferred_element_type=jnp.float32)
    seen = jnp.broadcast_to((jnp.arange(n * c)[None] < lengths_r[:, None])[:, None], scores.shape)
    scores = jnp.where(seen, scores * size**-0.5, NEGATIVE)
    top = scores.max(-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1)
    v_rsk = entries(v_pck, v_scale_p1c)
    out = jnp.einsum("rgs,rsk->rgk", weights.astype(v_rsk.dtype), v_rsk, preferred_element_type=jnp.float32)
    return out / jnp.maximum(total, 1e-30)[..., None], jnp.where(total > 0, top[..., 0] + jnp.log(total), NEGATIVE)
