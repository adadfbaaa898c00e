"""One vector for every chunk of positions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_pool import kernel, ref
from pallas_kernels.chunk_unpool import kernel as unpool_kernel
from pallas_kernels.dispatch import check_kind, check_shape, choose

HOW = ("sum", "mean", "max", "first", "last")


def chunk_pool(
    x_btd: jax.Array,
    ids_bt: jax.Array,
    m: int,
    how: str,
    inside_bt: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum, mean, maximum, first or last of the positions of every chunk.

    Args:
      x_btd: [b, t, d], finite. ids_bt: i32 [b, t] from 0, never decreasing along t: the chunk of every position; m or
        more: none.
      m: chunks. how: one of HOW.
      inside_bt: bool [b, t], positions that count; None: all.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere.
    Returns: [b, m, d], float32 for "sum" and "mean" and in the dtype of x for the others, and how many positions
    every chunk has, i32 [b, m]. A chunk without positions gets 0, and -inf for "max". Differentiable in x; positions
    that tie for a maximum share its gradient.
    Raises: ValueError for other shapes, dtypes or names.
    """
    check_shape("x_btd", x_btd, (None, None, None))
    check_kind("x_btd", x_btd, jnp.floating)
    check_shape("ids_bt", ids_bt, x_btd.shape[:2])
    check_kind("ids_bt", ids_bt, jnp.integer)
    if how not in HOW:
        raise ValueError(f"how: expected one of {', '.join(HOW)}, got {how!r}")
    if m < 1 or 0 in x_btd.shape:
        raise ValueError(f"m, x_btd: expected at least one chunk and one entry, got {m} and {list(x_btd.shape)}")
    if inside_bt is None:
        inside_bt = jnp.ones(ids_bt.shape, bool)
    check_shape("inside_bt", inside_bt, ids_bt.shape)
    chosen = choose(implementation)
    count = ref.segment_sum(inside_bt.astype(jnp.int32), ids_bt, m)
    if how == "max":
        return maximum(x_btd, ids_bt, inside_bt, m, chosen), count
    if how in ("first", "last"):
        end = _end(ids_bt, inside_bt, m, how)
        return total(x_btd, ids_bt, end, m, chosen, "pick").astype(x_btd.dtype), count
    u = total(x_btd, ids_bt, inside_bt, m, chosen, "sum")
    if how == "mean":
        u = u / jnp.maximum(count, 1).astype(jnp.float32)[:, :, None]
    return u, count


def total(x_btd: jax.Array, ids_bt: jax.Array, inside_bt: jax.Array, m: int, chosen: str, how: str) -> jax.Array:
    """Sums by the implementation `chosen`. how: "sum", or "pick" where every chunk has one position at most."""
    if chosen == "reference":
        return ref.segment_sum(_where(inside_bt, x_btd.astype(jnp.float32), 0.0), ids_bt, m)
    return _sum(x_btd, ids_bt, inside_bt, m, how, chosen == "interpret")


def maximum(x_btd: jax.Array, ids_bt: jax.Array, inside_bt: jax.Array, m: int, chosen: str) -> jax.Array:
    """Maxima by the implementation `chosen`."""
    if chosen == "reference":
        return ref.segment_max(_where(inside_bt, x_btd, -jnp.inf), ids_bt, m)
    return _max(x_btd, ids_bt, inside_bt, m, chosen == "interpret")


def _where(inside_bt: jax.Array, x_btd: jax.Array, nothing: float) -> jax.Array:
    return jnp.where(jnp.broadcast_to(inside_bt[:, :, None], x_btd.shape), x_btd, nothing)


def _end(ids_bt: jax.Array, inside_bt: jax.Array, m: int, how: str) -> jax.Array:
    """bool [b, t]: the first or last position of every chunk that counts."""
    at = jax.lax.broadcasted_iota(jnp.int32, ids_bt.shape, 1)
    sign = -1 if how == "first" else 1
    far = jnp.int32(-(2**30))
    best = ref.segment_max(jnp.where(inside_bt, sign * at, far), ids_bt, m)
    return inside_bt & (sign * at == ref.gather(best, jnp.minimum(ids_bt, m - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _sum(x_btd, ids_bt, inside_bt, m: int, how: str, interpret: Any) -> jax.Array:
    return kernel.pool(x_btd, ids_bt, inside_bt, m, how, interpret)


def _sum_forward(x_btd, ids_bt, inside_bt, m, how, interpret):
    like = jnp.zeros((0,), x_btd.dtype)
    return _sum(x_btd, ids_bt, inside_bt, m, how, interpret), (ids_bt, inside_bt, like)


def _sum_backward(m, how, interpret, saved, g_bmd):
    ids_bt, inside_bt, like = saved
    return _back(g_bmd.astype(like.dtype), ids_bt, inside_bt, interpret), None, None


_sum.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _max(x_btd, ids_bt, inside_bt, m: int, interpret: Any) -> jax.Array:
    return kernel.pool(x_btd, ids_bt, inside_bt, m, "max", interpret)


def _max_forward(x_btd, ids_bt, inside_bt, m, interpret):
    top = _max(x_btd, ids_bt, inside_bt, m, interpret)
    return top, (x_btd, ids_bt, inside_bt, top)


def _max_backward(m, interpret, saved, g_bmd):
    x_btd, ids_bt, inside_bt, top_bmd = saved
    top_bmd = jnp.where(jnp.isfinite(top_bmd), top_bmd, 0)
    shared = kernel.pool(x_btd, ids_bt, inside_bt, m, "ties", interpret, top_bmd)
    share = (g_bmd.astype(jnp.float32) / jnp.maximum(shared, 1.0)).astype(x_btd.dtype)
    return _back(share, ids_bt, inside_bt, interpret, (x_btd, top_bmd)), None, None


_max.defvjp(_max_forward, _max_backward)


def _back(
    u_bmd: jax.Array,
    ids_bt: jax.Array,
    inside_bt: jax.Array,
    interpret: Any,
    only: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """u at the positions of its chunk that count, 0 elsewhere; `only` as for the kernel."""
    read = jnp.where(inside_bt & (ids_bt < u_bmd.shape[1]), ids_bt, -1)
    return unpool_kernel.unpool(u_bmd, jnp.zeros_like(u_bmd[:, 0]), read, interpret, only)
