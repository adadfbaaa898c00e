"""mLSTM in blocks: scores of a block against each other, and the state of one head in VMEM."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm_chunk.layout import BLOCK, Blocks, column, flat, spec
from pallas_kernels.mlstm_chunk.ref import EPS, NEGATIVE, Parts, State
from pallas_kernels.products import LANES_BOTH, PLAIN, ROWS_BOTH, products

END = slice(BLOCK - 1, BLOCK)


def entering(rows: jax.Array, m_old: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponents before stabilisation with which positions enter the state after a block, f32 [1, BLOCK], and with
    which the state before it does, f32 [1, 1]; the greatest is the new m."""
    total, gate, document, goes_on = (rows[i : i + 1] for i in range(4))
    enters = jnp.where(document == document[:, END], total[:, END] - total + gate, NEGATIVE)
    return enters, total[:, END] + goes_on[:, END] * m_old


def advance(rows: jax.Array, k: jax.Array, v: jax.Array, state: State) -> State:
    """The state after a block: C f32 [k, v], n f32 [1, k], m f32 [1, 1]."""
    c_old, n_old, m_old = state
    enters, old = entering(rows, m_old)
    new = jnp.maximum(old, jnp.max(enters, axis=1, keepdims=True))
    keep = rows[3:4, END] * jnp.exp(old - new)
    fed = column(jnp.exp(enters - new))[:, :1] * k.astype(jnp.float32)
    c = keep * c_old + products(k.dtype)(fed.astype(k.dtype), v, ROWS_BOTH)
    return c, keep * n_old + jnp.sum(fed, axis=0, keepdims=True), new


def _step(rows_ref, q_ref, k_ref, v_ref, c0_ref, n0_ref, m0_ref, h_ref, c_ref, n_ref, m_ref, *, scale):
    @pl.when(pl.program_id(2) == 0)
    def _():
        c_ref[...], n_ref[...], m_ref[...] = c0_ref[...], n0_ref[...], m0_ref[...]

    dtype = q_ref.dtype
    dot = products(dtype)
    rows = rows_ref[...]
    total_j, gate_j, document_j, on_j = (rows[i : i + 1] for i in range(4))
    total_i, document_i, on_i = (column(x) for x in (total_j, document_j, on_j))
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    log = jnp.where((document_i == document_j) & (i >= j), total_i + (gate_j - total_j), NEGATIVE)
    # goes_on is 1 where a position belongs to the document of the state.
    goes_on, state = on_i[:, :1], (c_ref[...], n_ref[...], m_ref[...])
    c_old, n_old, m_old = state
    old = total_i[:, :1] + goes_on * m_old
    m = jnp.maximum(old, jnp.max(log, axis=1, keepdims=True))

    # Scaled after the product: a denominator may be small, and magnifies what rounding does to queries.
    q, k, v = q_ref[...], k_ref[...], v_ref[...]
    weights = dot(q, k, LANES_BOTH) * (scale * jnp.exp(log - m))
    share = goes_on * scale * jnp.exp(old - m)
    above = dot(weights.astype(dtype), v, PLAIN) + share * dot(q, c_old.astype(dtype), PLAIN)
    below = jnp.sum(weights, axis=1, keepdims=True) + share * jnp.sum(
        q.astype(jnp.float32) * n_old, axis=1, keepdims=True
    )
    h_ref[...] = above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)
    c_ref[...], n_ref[...], m_ref[...] = advance(rows, k, v, state)


def mlstm(parts: Parts, state: State, interpret: Any = False) -> tuple[jax.Array, State]:
    """`ref.mlstm`, in blocks of BLOCK positions."""
    (b, h, t, size), size_v = parts[0].shape, parts[2].shape[3]
    blocks, start = Blocks.of(parts), flat(state)
    keys, values = spec(BLOCK, size, 2), spec(BLOCK, size_v, 2)
    states = [spec(*x.shape[2:], None) for x in start]
    out, c, n, m = pl.pallas_call(
        functools.partial(_step, scale=size**-0.5),
        grid=(b, h, blocks.count),
        in_specs=[spec(4, BLOCK, 3), keys, keys, values, *states],
        out_specs=[values, *states],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (blocks.v, *start)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * t * (BLOCK + size) * (size + size_v), transcendentals=b * h * t * BLOCK,
            bytes_accessed=b * h * t * (blocks.q.dtype.itemsize * (2 * size + size_v) + 4 * size_v + 16),
        ),
        interpret=interpret,
        name="mlstm_chunk",
    )(*blocks, *start)  # fmt: skip
    return out[:, :, :t], (c, n[:, :, 0], m[:, :, 0, 0])
