"""The recurrence of an mLSTM layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check_kind, check_shape, choose
from pallas_kernels.mlstm_chunk import kernel, kernel_bwd, ref
from pallas_kernels.mlstm_chunk.ref import State


def mlstm_chunk(
    q_bhtk: jax.Array,
    k_bhtk: jax.Array,
    v_bhtv: jax.Array,
    gate_bht: jax.Array,
    forget_bht: jax.Array,
    documents_bt: jax.Array,
    state: State,
    *,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """C_t = F C_{t-1} + I k v^T, n_t = F n_{t-1} + I k, h_t = q^T C_t / (max(|q^T n_t|, exp(-m_t)) + 1e-6), with
    F = exp(forget + m_{t-1} - m_t), I = exp(gate - m_t), m_t = max(forget + m_{t-1}, gate) and q over sqrt(k)
    (Beck et al., 2024, "xLSTM", 2.3, and the chunkwise form of its kernels).

    All of it runs in float32, apart from the kernel's products for bfloat16 q, k, v. On TPU the gradient is
    kernels too, from inputs and results.

    Args:
      q_bhtk, k_bhtk: [b, h, t, k]. v_bhtv: [b, h, t, v] of the same dtype.
      gate_bht: f32 [b, h, t], input gate before exp (-1e30: the position does not enter the state).
      forget_bht: f32 [b, h, t], log-sigmoid of the forget gate, 0 or less (0: nothing fades).
      documents_bt: i32 [b, t] from 0, never decreasing along t; C, n and m start from zero where it changes, and
        document 0 continues `state`.
      state: C f32 [b, h, k, v], n f32 [b, h, k] and m f32 [b, h]; zeros before a text.
      chunk: positions per block of the reference; changes speed and memory, not results.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere.
    Returns: h f32 [b, h, t, v], and the state after the last position.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("q_bhtk", q_bhtk, (None,) * 4)
    b, h, t, k = q_bhtk.shape
    check_shape("k_bhtk", k_bhtk, q_bhtk.shape)
    check_shape("v_bhtv", v_bhtv, (b, h, t, None))
    check_shape("documents_bt", documents_bt, (b, t))
    check_kind("documents_bt", documents_bt, jnp.integer)
    c, n, m = state
    floats = {"gate_bht": (gate_bht, (b, h, t)), "forget_bht": (forget_bht, (b, h, t))}
    floats |= {"state C": (c, (b, h, k, v_bhtv.shape[3])), "state n": (n, (b, h, k)), "state m": (m, (b, h))}
    for name, (x, shape) in floats.items():
        check_shape(name, x, shape)
        check_kind(name, x, jnp.float32)
    if not q_bhtk.dtype == k_bhtk.dtype == v_bhtv.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q_bhtk.dtype}, {k_bhtk.dtype}, {v_bhtv.dtype}")
    if chunk < 1 or t < 1:
        raise ValueError(f"chunk, t: expected at least 1, got {chunk} and {t}")
    parts = (q_bhtk, k_bhtk, v_bhtv, gate_bht, forget_bht, documents_bt)
    chosen = choose(implementation)
    if chosen == "reference":
        return ref.mlstm(parts, state, min(chunk, t))
    return _mlstm(parts, state, chosen == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mlstm(parts: ref.Parts, state: State, interpret: Any) -> tuple[jax.Array, State]:
    return kernel.mlstm(parts, state, interpret)


def _mlstm_forward(parts, state, interpret):
    out = _mlstm(parts, state, interpret)
    return out, (parts, state, out)


def _mlstm_backward(interpret, saved, g):
    floats, to_state = kernel_bwd.mlstm_back(*saved, g, interpret)
    return (*floats, None), to_state


_mlstm.defvjp(_mlstm_forward, _mlstm_backward)
