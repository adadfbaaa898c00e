"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, computed in float32 (Zhang & Sennrich, 2019).

    Args: x [..., d] of any float dtype; weight [d]; eps is added to the mean square.
    Returns: the shape and dtype of x.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)).astype(x.dtype)
