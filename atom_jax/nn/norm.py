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


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Normalisation to mean 0 and variance 1 over the last axis, computed in float32 (Ba et al., 2016).

    Args: x [..., d] of any float dtype; weight, bias [d]; eps is added to the variance.
    Returns: the shape and dtype of x.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight, bias = (jnp.broadcast_to(w.astype(jnp.float32), x.shape) for w in (weight, bias))
    return (x32 * weight + bias).astype(x.dtype)
