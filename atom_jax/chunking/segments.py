"""Sums, maxima and scans over runs of positions, and chunks read by positions: O(t d) work and memory.

Every function treats each row of a batch on its own, so that a batch may be split over devices. On TPU they are
kernels, elsewhere their references (`pallas_kernels`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from atom_jax.sharding import split
from pallas_kernels.chunk_pool import ref as pool_ref
from pallas_kernels.chunk_pool.api import chunk_pool
from pallas_kernels.chunk_pool.ref import gather as gather
from pallas_kernels.chunk_smooth.api import chunk_smooth
from pallas_kernels.chunk_unpool import ref as unpool_ref
from pallas_kernels.chunk_unpool.api import chunk_unpool
from pallas_kernels.dispatch import choose

ROWS = ("batch",)


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
    """Sums of the entries of x f32 [b, t, ...] with equal ids i32 [b, t], which never decrease along t:
    [b, n, ...]."""
    return _pooled(x, ids, n, "sum") if _kernels() else pool_ref.segment_sum(x, ids, n)


def segment_max(x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Largest entries of x [b, t, ...] with equal ids i32 [b, t], which never decrease along t: [b, n, ...], and
    -inf where there are none. Entries that tie share the gradient evenly, as in `jnp.max`."""
    return _pooled(x, ids, n, "max") if _kernels() else pool_ref.segment_max(x, ids, n)


def linear_scan(a: jax.Array, x: jax.Array, reverse: bool = False) -> jax.Array:
    """y_j = a_j y_{j-1} + x_j along axis 1 (y_{j+1} when reversed), from zero: a f32 [b, m, 1], x f32 [b, m, d]."""
    return split(lambda a, x: chunk_smooth(a, x, reverse), (ROWS, ROWS), ROWS, a, x)


def read_chunks(x: jax.Array, z: jax.Array, read: jax.Array) -> jax.Array:
    """What every position reads: x[b, read[b, t]], or z[b] where read is -1.

    Args: x [b, m, ...]; z [b, ...] of the same dtype; read i32 [b, t] in [-1, m - 1], which apart from its -1s never
      decreases along t: the gradient is a sum over runs.
    Returns: [b, t, ...] in the dtype of x.
    """
    if not _kernels():
        return unpool_ref.read_chunks(x, z, read)

    def flat(x: jax.Array, z: jax.Array, read: jax.Array) -> jax.Array:
        return chunk_unpool(_one_axis(x, 2), read, _one_axis(z, 1))

    return split(flat, (ROWS,) * 3, ROWS, x, z, read).reshape(*read.shape, *x.shape[2:])


def _kernels() -> bool:
    return choose(None) != "reference"


def _pooled(x: jax.Array, ids: jax.Array, n: int, how: str) -> jax.Array:
    pooled = split(lambda x, ids: chunk_pool(_one_axis(x, 2), ids, n, how)[0], (ROWS, ROWS), ROWS, x, ids)
    return pooled.reshape(x.shape[0], n, *x.shape[2:])


def _one_axis(x: jax.Array, axis: int) -> jax.Array:
    """x with one axis instead of all from `axis` on."""
    return x.reshape(*x.shape[:axis], math.prod(x.shape[axis:]))


def _iota(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
