"""Sums, maxima and scans over runs of positions, and chunks read by positions: O(t d) work and memory.

Every function treats each row of a batch on its own, so that a batch may be split over devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Row b, entry i of the result is x[b, index[b, i]].

    Args: x [b, n, ...]; index i32 [b, i], within [0, n).
    Returns: [b, i, ...] in the dtype of x.
    """
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def gather_unique(x: jax.Array, index: jax.Array, used: jax.Array) -> jax.Array:
    """`gather` for indices of which no two used ones are equal, so that the gradient is a scatter without
    collisions; zeros where used bool [b, i] is False."""
    n = x.shape[1]
    # Unused entries point at places of their own, beyond the end.
    index = jnp.where(used, index, n + _iota(index))
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0, unique_indices=True))(x, index)


def scatter_unique(values: jax.Array, index: jax.Array, used: jax.Array, n: int) -> jax.Array:
    """[b, n, ...] zeros, with values[b, i] at index[b, i] where used bool [b, i]; no two used indices are equal."""
    index = jnp.where(used, index, n + _iota(index))

    def row(v: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.zeros((n, *v.shape[1:]), v.dtype).at[i].set(v, mode="drop", unique_indices=True)

    return jax.vmap(row)(values, index)


def segment_sum(x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Sums of the entries of x [b, t, ...] with equal ids i32 [b, t], which never decrease along t: [b, n, ...]."""
    one_row = functools.partial(jax.ops.segment_sum, num_segments=n, indices_are_sorted=True)
    return jax.vmap(one_row)(x, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def segment_max(x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Largest entries of x [b, t, ...] with equal ids i32 [b, t], which never decrease along t: [b, n, ...], and
    -inf where there are none. Entries that tie share the gradient evenly, as in `jnp.max`."""
    one_row = functools.partial(jax.ops.segment_max, num_segments=n, indices_are_sorted=True)
    return jax.vmap(one_row)(x, ids)


def _segment_max_forward(x, ids, n):
    top = segment_max(x, ids, n)
    return top, (x, ids, top)


def _segment_max_backward(n, saved, g):
    x, ids, top = saved
    tied = (x == gather(top, ids)).astype(jnp.float32)
    share = g.astype(jnp.float32) / jnp.maximum(segment_sum(tied, ids, n), 1.0)
    return (tied * gather(share, ids)).astype(x.dtype), None


segment_max.defvjp(_segment_max_forward, _segment_max_backward)


def linear_scan(a: jax.Array, x: jax.Array, reverse: bool = False) -> jax.Array:
    """y_j = a_j y_{j-1} + x_j along axis 1 (y_{j+1} when reversed), from zero: a [b, m, 1], x [b, m, d]."""

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(combine, (a, x), reverse=reverse, axis=1)[1]


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


def _iota(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
