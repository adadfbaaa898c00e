"""mLSTM in blocks: scores of a block against each other, and the state of one head in VMEM."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm_chunk.ref import EPS, NEGATIVE, Parts, State, padded, sums

BLOCK = 128


def _step(rows_ref, q_ref, k_ref, v_ref, c0_ref, n0_ref, m0_ref, h_ref, c_ref, n_ref, m_ref, *, scale):
    @pl.when(pl.program_id(2) == 0)
    def _():
        c_ref[...], n_ref[...], m_ref[...] = c0_ref[...], n0_ref[...], m0_ref[...]

    dtype = q_ref.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
    plain, lanes_both, rows_both = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))

    def column(row_1j: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row_1j, (BLOCK, BLOCK)).T

    rows = rows_ref[...]
    total_j, gate_j, document_j, on_j = (rows[i : i + 1] for i in range(4))
    total_i, document_i, on_i = (column(x) for x in (total_j, document_j, on_j))
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    log = jnp.where((document_i == document_j) & (i >= j), total_i + (gate_j - total_j), NEGATIVE)
    # goes_on is 1 where a position belongs to the document of the state.
    goes_on, m_old, n_old, c_old = on_i[:, :1], m_ref[...], n_ref[...], c_ref[...]
    old = total_i[:, :1] + goes_on * m_old
    m = jnp.maximum(old, jnp.max(log, axis=1, keepdims=True))

    q = q_ref[...].astype(jnp.float32) * scale
    k, v = k_ref[...], v_ref[...]
    weights = dot(q.astype(dtype), k, lanes_both) * jnp.exp(log - m)
    share = goes_on * jnp.exp(old - m)
    above = dot(weights.astype(dtype), v, plain) + share * dot(q.astype(dtype), c_old.astype(dtype), plain)
    below = jnp.sum(weights, axis=1, keepdims=True) + share * jnp.sum(q * n_old, axis=1, keepdims=True)
    h_ref[...] = above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)

    end = slice(BLOCK - 1, BLOCK)
    last = document_i == document_j[:, end]
    enters = jnp.where(last, total_j[:, end] - total_i + column(gate_j), NEGATIVE)[:, :1]
    new = jnp.maximum(old[end], jnp.max(enters, axis=0, keepdims=True))
    keep = on_j[:, end] * jnp.exp(old[end] - new)
    fed = jnp.exp(enters - new) * k.astype(jnp.float32)
    c_ref[...] = keep * c_old + dot(fed.astype(dtype), v, rows_both)
    n_ref[...] = keep * n_old + jnp.sum(fed, axis=0, keepdims=True)
    m_ref[...] = new


def mlstm(parts: Parts, state: State, interpret: Any = False) -> tuple[jax.Array, State]:
    """`ref.mlstm`, in blocks of BLOCK positions."""
    (b, h, t, size), size_v = parts[0].shape, parts[2].shape[3]
    q, k, v, gate, forget, document = padded(parts, BLOCK)
    long = document.shape[1]
    blocks = long // BLOCK
    by_block = document.reshape(b * blocks, BLOCK)
    forget_by_block = forget.reshape(b, h, blocks, BLOCK).swapaxes(1, 2).reshape(b * blocks, h, BLOCK)
    total = sums(forget_by_block, by_block).reshape(b, blocks, h, BLOCK).swapaxes(1, 2).reshape(b, h, long)
    ends = jnp.pad(document[:, BLOCK - 1 : -1 : BLOCK], ((0, 0), (1, 0)))
    goes_on = document == jnp.repeat(ends, BLOCK, axis=1)

    def for_heads(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x.astype(jnp.float32)[:, None], (b, h, long))

    rows = jnp.stack([total, gate, for_heads(document), for_heads(goes_on)], axis=2)
    c0 = state[0]
    n0, m0 = state[1][:, :, None], state[2][:, :, None, None]

    def spec(rows: int, lanes: int, along: int | None) -> pl.BlockSpec:
        """Blocks of one head, which go along axis 2 or 3 with the positions, or stay."""
        at = {None: lambda i, n, j: (i, n, 0, 0), 2: lambda i, n, j: (i, n, j, 0), 3: lambda i, n, j: (i, n, 0, j)}
        return pl.BlockSpec((None, None, rows, lanes), at[along])

    keys, values = spec(BLOCK, q.shape[3], 2), spec(BLOCK, v.shape[3], 2)
    states = [spec(*x.shape[2:], None) for x in (c0, n0, m0)]
    out, c, n, m = pl.pallas_call(
        functools.partial(_step, scale=size**-0.5),
        grid=(b, h, blocks),
        in_specs=[spec(4, BLOCK, 3), keys, keys, values, *states],
        out_specs=[values, *states],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v, c0, n0, m0)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * t * (BLOCK + size) * (size + size_v), transcendentals=b * h * t * BLOCK,
            bytes_accessed=b * h * t * (q.dtype.itemsize * (2 * size + size_v) + 4 * size_v + 16),
        ),
        interpret=interpret,
        name="mlstm_chunk",
    )(rows, q, k, v, c0, n0, m0)  # fmt: skip
    return out[:, :, :t], (c, n[:, :, 0], m[:, :, 0, 0])
