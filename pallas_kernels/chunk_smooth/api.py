"""Smoothing of chunks by a first-order recurrence (H-Net's de-chunking, arXiv 2507.07955, 2.2.2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_smooth import kernel, ref
from pallas_kernels.dispatch import check_kind, check_shape, choose, pad_axis


def chunk_smooth(
    a_bm1: jax.Array, x_bmd: jax.Array, reverse: bool = False, *, implementation: str | None = None
) -> jax.Array:
    """y_j = a_j y_{j-1} + x_j along axis 1, from zero.

    With a = 1 - P, x = P v and a = 0 where a document begins this is the exponential moving average that brings
    chunks back to positions.

    Args:
      a_bm1: f32 [b, m, 1], factors of any size, 0 included. x_bmd: f32 [b, m, d].
      reverse: y_j = a_j y_{j+1} + x_j instead.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere.
    Returns: f32 [b, m, d]. Differentiable in both.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("x_bmd", x_bmd, (None, None, None))
    check_shape("a_bm1", a_bm1, (*x_bmd.shape[:2], 1))
    for name, x in (("a_bm1", a_bm1), ("x_bmd", x_bmd)):
        check_kind(name, x, jnp.float32)
    chosen = choose(implementation)
    if chosen == "reference" or 0 in x_bmd.shape:
        return ref.linear_scan(a_bm1, x_bmd, reverse)
    return _scan(a_bm1, x_bmd, reverse, chosen == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(a_bm1: jax.Array, x_bmd: jax.Array, reverse: bool, interpret: Any) -> jax.Array:
    b, m, d = x_bmd.shape
    x = pad_axis(pad_axis(x_bmd, 1, kernel.BLOCK), 2, 128)
    a = pad_axis(a_bm1.reshape(b, 1, m), 2, kernel.BLOCK)
    return kernel.linear_scan(a, x, reverse, interpret)[:, :m, :d]


def _scan_forward(a_bm1, x_bmd, reverse, interpret):
    y = _scan(a_bm1, x_bmd, reverse, interpret)
    return y, (a_bm1, y)


def _scan_backward(reverse, interpret, saved, g_bmd):
    """dx_j = g_j + a_{j+1} dx_{j+1}, and da_j = <dx_j, y_{j-1}>."""
    a_bm1, y_bmd = saved
    dx = _scan(_shift(a_bm1, not reverse), g_bmd, not reverse, interpret)
    return jnp.sum(dx * _shift(y_bmd, reverse), axis=-1, keepdims=True), dx


_scan.defvjp(_scan_forward, _scan_backward)


def _shift(x: jax.Array, back: bool) -> jax.Array:
    """x one place later along axis 1, or earlier when `back`; zeros come in."""
    zero = jnp.zeros_like(x[:, :1])
    return jnp.concatenate([x[:, 1:], zero] if back else [zero, x[:, :-1]], axis=1)
