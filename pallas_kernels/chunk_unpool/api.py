"""From chunks back to positions: every position reads one chunk, and the transpose."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_pool import kernel as pool_kernel
from pallas_kernels.chunk_unpool import kernel, ref
from pallas_kernels.dispatch import check_kind, check_shape, choose


def chunk_unpool(
    x_bmd: jax.Array, read_bt: jax.Array, z_bd: jax.Array | None = None, *, implementation: str | None = None
) -> jax.Array:
    """What every position reads: x_bmd[b, read_bt[b, t]], or z_bd[b] where that is -1.

    Args:
      x_bmd: [b, m, d], finite. read_bt: i32 [b, t] in [-1, m - 1], which apart from its -1s never decreases along t.
      z_bd: [b, d] in the dtype of x; None: zeros.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere.
    Returns: [b, t, d] in the dtype of x, exact. Differentiable in x and z, with float32 sums.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("x_bmd", x_bmd, (None, None, None))
    check_kind("x_bmd", x_bmd, jnp.floating)
    b, _, d = x_bmd.shape
    check_shape("read_bt", read_bt, (b, None))
    check_kind("read_bt", read_bt, jnp.integer)
    z_bd = jnp.zeros((b, d), x_bmd.dtype) if z_bd is None else z_bd
    check_shape("z_bd", z_bd, (b, d))
    if z_bd.dtype != x_bmd.dtype:
        raise ValueError(f"z_bd: expected the dtype of x_bmd, {x_bmd.dtype}, got {z_bd.dtype}")
    chosen = choose(implementation)
    if chosen == "reference":
        return ref.read_chunks(x_bmd, z_bd, read_bt)
    return _read(x_bmd, z_bd, read_bt, chosen == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(x_bmd: jax.Array, z_bd: jax.Array, read_bt: jax.Array, interpret: Any) -> jax.Array:
    return kernel.unpool(x_bmd, z_bd, read_bt, interpret)


def _read_forward(x_bmd, z_bd, read_bt, interpret):
    return _read(x_bmd, z_bd, read_bt, interpret), (read_bt, jnp.zeros((0, x_bmd.shape[1]), x_bmd.dtype))


def _read_backward(interpret, saved, g_btd):
    read_bt, like = saved
    none = read_bt < 0
    ids = jax.lax.cummax(jnp.maximum(read_bt, 0), axis=1)
    to_x = pool_kernel.pool(g_btd, ids, ~none, like.shape[1], "sum", interpret)
    to_z = jnp.einsum("bt,btd->bd", none.astype(jnp.float32), g_btd.astype(jnp.float32), precision="highest")
    return to_x.astype(like.dtype), to_z.astype(like.dtype), None


_read.defvjp(_read_forward, _read_backward)
