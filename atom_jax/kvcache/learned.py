"""What a model learns to say of its memory, token by token: projections, and the relaxation of decisions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.kvcache.policy import Heads
from atom_jax.nn.norm import rms_norm
from atom_jax.sharding import constrain


def project(heads: Heads, norm_d: jax.Array, weight_dh: jax.Array, bias_h: jax.Array | None = None) -> jax.Array:
    """A number per head and token from the normalised residual stream, float32 [b, h, t]."""
    y = rms_norm(heads.x_btd, norm_d, heads.eps)
    z = jnp.einsum("btd,dh->bth", y, weight_dh.astype(y.dtype), preferred_element_type=jnp.float32)
    z = constrain(z, "batch", "stored_length", None)
    if bias_h is not None:
        z += bias_h.astype(jnp.float32)[None, None]
    return z.transpose(0, 2, 1)


def logistic(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard logistic noise, the difference of two standard Gumbel draws, float32."""
    return constrain(jax.random.logistic(key, shape, jnp.float32), None, "batch", "kv_heads", "length")


def shift(x_bht: jax.Array, last: float) -> jax.Array:
    """What was said at token t + 1, at t; `last` for the newest token."""
    return jnp.concatenate([x_bht[..., 1:], jnp.full_like(x_bht[..., :1], last)], axis=-1)


def straight_through(soft: jax.Array, hard: jax.Array) -> jax.Array:
    """The values of `hard` with the gradient of `soft`."""
    return soft + jax.lax.stop_gradient(hard - soft)
