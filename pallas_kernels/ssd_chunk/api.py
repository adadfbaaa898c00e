"""The scan of a Mamba-2 layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check_kind, check_shape, choose
from pallas_kernels.ssd_chunk import kernel, kernel_bwd, ref


def ssd_chunk(
    x_bthk: jax.Array,
    dt_bth: jax.Array,
    decay_bth: jax.Array,
    b_btn: jax.Array,
    c_btn: jax.Array,
    documents_bt: jax.Array,
    s_bhkn: jax.Array,
    *,
    chunk: int = 256,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = exp(decay_t) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t for every head, in blocks (Dao & Gu, 2024,
    "Transformers are SSMs", section 6).

    Products inside a block run in the dtype of x with float32 sums; states and decays are float32. On TPU the
    gradient is kernels too; nothing but the inputs is kept for it.

    Args:
      x_bthk: [b, t, h, k]. dt_bth, decay_bth: f32 [b, t, h], time steps and log decays (0 or less).
      b_btn, c_btn: [b, t, n] in the dtype of x, the same for all heads.
      documents_bt: i32 [b, t] from 0, never decreasing along t; the state starts anew where it changes, and document
        0 continues s_bhkn, f32 [b, h, k, n].
      chunk: positions per block of the reference; changes speed and memory, not results.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere.
    Returns: y f32 [b, t, h, k], and the state after the last position.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("x_bthk", x_bthk, (None,) * 4)
    b, t, h, k = x_bthk.shape
    for name, x in (("dt_bth", dt_bth), ("decay_bth", decay_bth)):
        check_shape(name, x, (b, t, h))
    check_shape("b_btn", b_btn, (b, t, None))
    check_shape("c_btn", c_btn, b_btn.shape)
    check_shape("documents_bt", documents_bt, (b, t))
    check_kind("documents_bt", documents_bt, jnp.integer)
    check_shape("s_bhkn", s_bhkn, (b, h, k, b_btn.shape[2]))
    for name, x in (("dt_bth", dt_bth), ("decay_bth", decay_bth), ("s_bhkn", s_bhkn)):
        check_kind(name, x, jnp.float32)
    if not x_bthk.dtype == b_btn.dtype == c_btn.dtype:
        raise ValueError(
            f"x_bthk, b_btn, c_btn: expected one dtype, got {x_bthk.dtype}, {b_btn.dtype}, {c_btn.dtype}"
        )
    if chunk < 1 or t < 1:
        raise ValueError(f"chunk, t: expected at least 1, got {chunk} and {t}")
    parts = (x_bthk, dt_bth, decay_bth, b_btn, c_btn, documents_bt)
    chosen = choose(implementation)
    if chosen == "reference":
        return ref.ssd(parts, s_bhkn, min(chunk, t))
    return _ssd(parts, s_bhkn, chosen == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ssd(parts: ref.Parts, s_bhkn: jax.Array, interpret: Any) -> tuple[jax.Array, jax.Array]:
    return kernel.ssd(parts, s_bhkn, interpret)


def _ssd_forward(parts, s_bhkn, interpret):
    return _ssd(parts, s_bhkn, interpret), (parts, s_bhkn)


def _ssd_backward(interpret, saved, g):
    dx, ddt, ddecay, db, dc, ds = kernel_bwd.ssd_back(*saved, g, interpret)
    return (dx, ddt, ddecay, db, dc, None), ds


_ssd.defvjp(_ssd_forward, _ssd_backward)
