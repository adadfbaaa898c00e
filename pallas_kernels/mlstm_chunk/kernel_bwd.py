"""Gradients of mLSTM, block after block from the last.

Outputs depend on C exp(m) and n exp(m), apart from EPS. What is carried for m is therefore its gradient with these
held, dm - <C, dC> - <n, dn>: it is of the size of EPS within a text, where dm itself is a difference of large sums.
It goes where the maximum is taken, in equal parts among equals, like that of the reference. The states at which
blocks begin are computed again; scores are [j, i] here, so that most products need nothing turned, and sums over i
and j of one gradient serve forget gates, in which pairs of one side cancel.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm_chunk.kernel import END, advance, entering
from pallas_kernels.mlstm_chunk.layout import BLOCK, Blocks, block_sums, column, flat, spec
from pallas_kernels.mlstm_chunk.ref import EPS, NEGATIVE, Parts, State, padded
from pallas_kernels.products import LANES_BOTH, PLAIN, ROWS_BOTH, products
from pallas_kernels.select import select

SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _states_step(rows_ref, k_ref, v_ref, c0_ref, n0_ref, m0_ref, *refs):
    outputs, state = refs[:3], refs[3:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, start in zip(state, (c0_ref, n0_ref, m0_ref)):
            ref[...] = start[...]

    old = tuple(ref[...] for ref in state)
    for ref, now in zip(outputs, old):
        ref[...] = now
    for ref, new in zip(state, advance(rows_ref[...], k_ref[...], v_ref[...], old)):
        ref[...] = new


def _states(blocks: Blocks, start: State, interpret: Any) -> list[jax.Array]:
    """C, n and m before every block, f32 [b, h, blocks, ...]."""
    b, h = blocks.q.shape[:2]
    sizes = [x.shape[2:] for x in start]
    keys, values = (spec(BLOCK, x.shape[3], 2) for x in (blocks.k, blocks.v))
    return pl.pallas_call(
        _states_step,
        grid=(b, h, blocks.count),
        in_specs=[spec(4, BLOCK, 3), keys, values, *(spec(*size, None) for size in sizes)],
        out_specs=[pl.BlockSpec((None, None, None, *size), lambda b, h, j: (b, h, j, 0, 0)) for size in sizes],
        out_shape=[jax.ShapeDtypeStruct((b, h, blocks.count, *size), jnp.float32) for size in sizes],
        scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in sizes],
        compiler_params=SEMANTICS,
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks.k.size * blocks.v.shape[3], transcendentals=0,
            bytes_accessed=blocks.k.nbytes + blocks.v.nbytes + 4 * start[0].size * blocks.count,
        ),
        interpret=interpret,
        name="mlstm_chunk_states",
    )(blocks.rows, blocks.k, blocks.v, *start)  # fmt: skip


def _lane_sums(a: jax.Array) -> jax.Array:
    """f32 [1, rows of a]: sums over lanes, as a product."""
    return select(jnp.ones((8, a.shape[1]), jnp.bool_), a, 1, 1)[:1]


def _taken(old: jax.Array, logs: jax.Array, axis: int, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `old` and `logs` from that of the greatest of both along `axis`."""
    best = jnp.max(logs, axis=axis, keepdims=True)
    to_old = jnp.where(old > best, 1.0, jnp.where(old == best, 0.5, 0.0)) * g
    equal = (logs == best).astype(jnp.float32)
    return to_old, equal * ((g - to_old) / jnp.sum(equal, axis=axis, keepdims=True))


class _Weights(NamedTuple):
    """Of a block, rows [1, BLOCK] by position i and matrices [j, i]: exponents of the state and of pairs, their
    stabiliser, factors of the state and of pairs, and products of keys and queries."""

    old: jax.Array
    logs: jax.Array
    m: jax.Array
    share: jax.Array
    factors: jax.Array
    scores: jax.Array

    @classmethod
    def of(cls, rows: jax.Array, q: jax.Array, k: jax.Array, m_old: jax.Array, scale: float) -> _Weights:
        total, gate, document, goes_on = (rows[i : i + 1] for i in range(4))
        j, i = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
        seen = (column(document) == document) & (i >= j)
        logs = jnp.where(seen, total + column(gate - total), NEGATIVE)
        old = total + goes_on * m_old
        m = jnp.maximum(old, jnp.max(logs, axis=0, keepdims=True))
        scores = products(k.dtype)(k, q, LANES_BOTH) * scale
        return cls(old, logs, m, goes_on * jnp.exp(old - m), jnp.exp(logs - m), scores)


def _step(
    rows_ref, q_ref, k_ref, v_ref, c_ref, n_ref, m_ref, h_ref, dh_ref, gc_ref, gn_ref, gm_ref,
    dq_ref, dk_ref, dv_ref, dgates_ref, dc_ref, dn_ref, dm_ref, *, scale,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        dc_ref[...], dn_ref[...], dm_ref[...] = gc_ref[...], gn_ref[...], gm_ref[...]

    dtype = q_ref.dtype
    dot = products(dtype)
    rows, q = rows_ref[...], q_ref[...].astype(jnp.float32) * scale
    k, v, dh, n_old = k_ref[...], v_ref[...], dh_ref[...].astype(dtype), n_ref[...]
    w = _Weights.of(rows, q_ref[...], k, m_ref[...], scale)

    # Denominators.
    weights, least = w.scores * w.factors, jnp.exp(-w.m)
    below = jnp.sum(weights, axis=0, keepdims=True) + w.share * _lane_sums(q * n_old)
    inverse = 1.0 / (jnp.maximum(jnp.abs(below), least) + EPS)
    dbelow = -_lane_sums(dh_ref[...] * h_ref[...]) * inverse
    from_max, dlogs = _taken(w.old, w.logs, 0, EPS * dbelow)
    counts = jnp.where(jnp.abs(below) > least, 1.0, jnp.where(jnp.abs(below) == least, 0.5, 0.0))
    dbelow = dbelow * counts * jnp.sign(below)

    # Pairs within the block.
    pairs = w.factors * (dot(v, dh, LANES_BOTH) * inverse + dbelow)
    dlogs += w.scores * pairs
    pairs = pairs.astype(dtype)
    dq, dk = dot(pairs, k, ROWS_BOTH), dot(pairs, q_ref[...], PLAIN) * scale
    dv = dot((weights * inverse).astype(dtype), dh, PLAIN)

    # The state before the block, in outputs.
    through_c, through_n = column(w.share * inverse)[:, :1], column(w.share * dbelow)[:, :1]
    from_state = through_c * dot(dh, c_ref[...].astype(dtype), LANES_BOTH) + through_n * n_old
    dq_ref[...] = ((dq + from_state) * scale).astype(dq_ref.dtype)
    dold = _lane_sums(q * from_state) + from_max

    # The state after the block.
    enters, old_end = entering(rows, m_ref[...])
    new = jnp.maximum(old_end, jnp.max(enters, axis=1, keepdims=True))
    keep, enter = rows[3:4, END] * jnp.exp(old_end - new), column(jnp.exp(enters - new))[:, :1]
    dc, dn = dc_ref[...], dn_ref[...]
    fed, dfed = enter * k.astype(jnp.float32), dot(v, dc.astype(dtype), LANES_BOTH) + dn
    dk_ref[...] = (dk + enter * dfed).astype(dk_ref.dtype)
    dv_ref[...] = (dv + dot(fed.astype(dtype), dc.astype(dtype), PLAIN)).astype(dv_ref.dtype)
    end_from_max, denters = _taken(old_end, enters, 1, dm_ref[...])
    denters += _lane_sums(fed * dfed)
    kept = jnp.sum(jnp.sum(c_ref[...] * dc, axis=0, keepdims=True), axis=1, keepdims=True)
    kept = keep * (kept + jnp.sum(n_old * dn, axis=1, keepdims=True))

    dgate = _lane_sums(dlogs) + denters
    at_end = jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) == BLOCK - 1
    to_end = kept + end_from_max + jnp.sum(denters, axis=1, keepdims=True)
    dgates_ref[0:1, :] = dgate
    dgates_ref[1:2, :] = jnp.sum(dlogs, axis=0, keepdims=True) + dold - dgate + jnp.where(at_end, to_end, 0.0)
    dc_ref[...] = keep * dc + dot((through_c * q).astype(dtype), dh, ROWS_BOTH)
    dn_ref[...] = keep * dn + jnp.sum(through_n * q, axis=0, keepdims=True)
    dm_ref[...] = jnp.sum(rows[3:4] * from_max, axis=1, keepdims=True) + rows[3:4, END] * end_from_max


def _held(state: State, g: State) -> jax.Array:
    """<C, dC> + <n, dn>, f32 [b, h]."""
    return jnp.sum(state[0] * g[0], axis=(2, 3)) + jnp.sum(state[1] * g[1], axis=2)


def mlstm_back(
    parts: Parts, state: State, out: tuple[jax.Array, State], g: tuple[jax.Array, State], interpret: Any = False
) -> tuple[list[jax.Array], State]:
    """Gradients of the floats among `parts` and of `state`, from those of `out`, the results of `ref.mlstm`."""
    blocks, t, size = Blocks.of(parts), parts[0].shape[2], parts[0].shape[3]
    b, h, long, size_v = blocks.v.shape
    start, g_end = flat(state), flat((*g[1][:2], g[1][2] - _held(out[1], g[1])))
    of_h = [jnp.pad(x, ((0, 0), (0, 0), (0, long - t), (0, 0))) for x in (out[0], g[0])]
    count = blocks.count
    keys, values = spec(BLOCK, size, 2, count), spec(BLOCK, size_v, 2, count)
    sizes = [x.shape[2:] for x in start]
    before = [pl.BlockSpec((None, None, None, *s), lambda b, h, j: (b, h, count - 1 - j, 0, 0)) for s in sizes]
    states = [spec(*s, None) for s in sizes]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (blocks.q, blocks.k, blocks.v)]
    shapes += [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, h, 2, long), *(x.shape for x in start))]
    dq, dk, dv, dgates, dc, dn, dm = pl.pallas_call(
        functools.partial(_step, scale=size**-0.5),
        grid=(b, h, count),
        in_specs=[spec(4, BLOCK, 3, count), keys, keys, values, *before, values, values, *states],
        out_specs=[keys, keys, values, spec(2, BLOCK, 3, count), *states],
        out_shape=shapes,
        compiler_params=SEMANTICS,
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * t * (BLOCK * (3 * size + 2 * size_v) + 4 * size * size_v),
            transcendentals=b * h * t * BLOCK,
            bytes_accessed=2 * sum(x.nbytes for x in blocks[1:]) + 2 * of_h[0].nbytes + 4 * start[0].size * count,
        ),
        interpret=interpret,
        name="mlstm_chunk_back",
    )(*blocks, *_states(blocks, start, interpret), *of_h, *g_end)  # fmt: skip
    document = padded(parts, BLOCK)[-1]
    forget = jnp.zeros((b, h, long), jnp.float32)
    (dforget,) = jax.linear_transpose(lambda forget: block_sums(forget, document), forget)(dgates[:, :, 1])
    dn, dm = dn[:, :, 0], dm[:, :, 0, 0]
    to_parts = [dq, dk, dv, dgates[:, :, 0], dforget]
    return [x[:, :, :t] for x in to_parts], (dc, dn, dm + _held(state, (dc, dn)))
