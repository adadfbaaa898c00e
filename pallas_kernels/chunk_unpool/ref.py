"""What `chunk_unpool` means."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_pool.ref import gather, segment_sum


@jax.custom_vjp
def read_chunks(x: jax.Array, z: jax.Array, read: jax.Array) -> jax.Array:
    """What every position reads: x[b, read[b, t]], or z[b] where read is -1.

    Args: x [b, m, ...]; z [b, ...] of the same dtype; read i32 [b, t] in [-1, m - 1], which apart from its -1s never
      decreases along t: the gradient is a sum over runs.
    Returns: [b, t, ...] in the dtype of x.
    """
    none = _like(read < 0, x)
    return jnp.where(none, z[:, None], gather(x, jnp.maximum(read, 0)))


def _read_forward(x, z, read):
    return read_chunks(x, z, read), (read, jnp.zeros((0, x.shape[1]), x.dtype))


def _read_backward(saved, g):
    read, like = saved
    g32, none = g.astype(jnp.float32), _like(read < 0, g)
    ids = jax.lax.cummax(jnp.maximum(read, 0), axis=1)
    to_x = segment_sum(jnp.where(none, 0.0, g32), ids, like.shape[1])
    to_z = jnp.sum(jnp.where(none, g32, 0.0), axis=1)
    return to_x.astype(like.dtype), to_z.astype(like.dtype), None


read_chunks.defvjp(_read_forward, _read_backward)


def _like(flag: jax.Array, x: jax.Array) -> jax.Array:
    """flag [b, t] with trailing axes of length one, to select among the entries of x [b, ?, ...]."""
    return flag.reshape(*flag.shape, *[1] * (x.ndim - 2))
