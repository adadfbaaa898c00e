"""Sums and maxima over the positions of every chunk.

Chunks are runs of positions, so a tile of chunks is fed by a run of tiles of positions; every such pair of tiles is
one step. Sums are products with a matrix of zeros and ones. For maxima, every position first learns the largest value
since its chunk or the tile began (a scan in log2 steps); the last position of a chunk in the tile then speaks for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_unpool.kernel import CHUNKS, POSITIONS, width
from pallas_kernels.dispatch import pad_axis
from pallas_kernels.select import select
from pallas_kernels.visits import members, visits

# Stands for -inf among values that meet zeros in a product; a power of two, so that bfloat16 has it too.
LOWEST = -(2.0**100)


def _step(output, source, count, code_ref, x_ref, *refs, steps, how):
    *top_ref, u_ref = refs
    row, step = pl.program_id(0), pl.program_id(2)
    at = row * steps + step
    begins = (step == 0) | (output[at] != output[jnp.maximum(at - 1, 0)])

    @pl.when(begins)
    def _():
        u_ref[...] = jnp.full_like(u_ref, -jnp.inf if how == "max" else 0.0)

    @pl.when(step < count[row])
    def _():
        # The chunk and, in the lowest bit, whether the position counts.
        code_1t, x = code_ref[...], x_ref[...]
        mine = jax.lax.broadcasted_iota(jnp.int32, (CHUNKS, POSITIONS), 0) + output[at] * CHUNKS
        if how == "max":
            speaks = (mine == code_1t >> 1) & _last(code_1t >> 1)
            # In float32: the compiler for v6e refuses masks of bfloat16 that meet a column.
            top, old = select(speaks, _running_max(code_1t, x), 1), u_ref[...].astype(jnp.float32)
            found = jnp.max(speaks.astype(jnp.float32), axis=1, keepdims=True) > 0
            u_ref[...] = jnp.where(found & (top > LOWEST), jnp.maximum(old, top), old).astype(u_ref.dtype)
        else:
            member = mine * 2 + 1 == code_1t
            if how == "ties":
                x = (x == select(member, top_ref[0][...], 0).astype(x.dtype)).astype(jnp.bfloat16)
            u_ref[...] += select(member, x, 1).astype(u_ref.dtype)


def _last(chunk_1t: jax.Array) -> jax.Array:
    """bool [1, t]: the last position of its chunk within the tile."""
    n = chunk_1t.shape[1]
    end = jax.lax.broadcasted_iota(jnp.int32, chunk_1t.shape, 1) == n - 1
    return end | (pltpu.roll(chunk_1t, n - 1, 1) != chunk_1t)


def _running_max(code_1t: jax.Array, x: jax.Array) -> jax.Array:
    n = code_1t.shape[1]
    code = jnp.broadcast_to(code_1t, (128, n)).T
    chunk, row = code >> 1, jax.lax.broadcasted_iota(jnp.int32, code.shape, 0)
    parts = [
        jnp.where(code & 1 == 1, jnp.maximum(x[:, i : i + 128].astype(jnp.float32), LOWEST), LOWEST)
        for i in range(0, x.shape[1], 128)
    ]
    step = 1
    while step < n:
        same = (row >= step) & (pltpu.roll(chunk, step, 0) == chunk)
        parts = [jnp.maximum(part, jnp.where(same, pltpu.roll(part, step, 0), LOWEST)) for part in parts]
        step *= 2
    return jnp.concatenate(parts, axis=1).astype(x.dtype)


def pool(
    x_btd: jax.Array,
    ids_bt: jax.Array,
    inside_bt: jax.Array,
    m: int,
    how: str,
    interpret: Any = False,
    top_bmd: jax.Array | None = None,
) -> jax.Array:
    """[b, m, d]. "sum": float32; "pick": the same in the dtype of x, for one position of every chunk; "max": -inf for
    chunks of nothing, in the dtype of x; "ties": float32, how many positions equal top_bmd of their chunk."""
    b, t, d = x_btd.shape
    x = pad_axis(pad_axis(x_btd, 1, POSITIONS), 2, 128)
    ids = pad_axis(ids_bt.astype(jnp.int32), 1, POSITIONS, m)
    m_tiles, t_tiles, w = -(-m // CHUNKS), ids.shape[1] // POSITIONS, width(x.shape[2])
    # Positions beyond the last chunk belong to a tile that nobody makes.
    ids = jnp.where(ids >= m, m_tiles * CHUNKS, ids)
    code = ids * 2 + pad_axis(inside_bt.astype(jnp.int32), 1, POSITIONS)
    steps = t_tiles + m_tiles
    found = visits(*members(ids.reshape(b, t_tiles, POSITIONS), CHUNKS, m_tiles), steps)
    dtype = jnp.float32 if how in ("sum", "ties") else x.dtype
    tops = [] if top_bmd is None else [pad_axis(pad_axis(top_bmd, 1, CHUNKS), 2, 128)]

    def tile(rows: int, which: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, w), lambda i, j, s, *lists: (i, lists[which][i * steps + s], j))

    return pl.pallas_call(
        functools.partial(_step, steps=steps, how=how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, x.shape[2] // w, steps),
            in_specs=[
                pl.BlockSpec((None, 1, POSITIONS), lambda i, j, s, _, source, *__: (i, 0, source[i * steps + s])),
                tile(POSITIONS, 1),
                *[tile(CHUNKS, 0)] * len(tops),
            ],
            out_specs=tile(CHUNKS, 0),
        ),
        out_shape=jax.ShapeDtypeStruct((b, m_tiles * CHUNKS, x.shape[2]), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * steps * POSITIONS * CHUNKS * d, transcendentals=0,
            bytes_accessed=x.dtype.itemsize * b * t * d + 4 * b * m * d + 4 * b * t,
        ),
        interpret=interpret,
        name=f"chunk_pool_{how}",
    )(*found, code[:, None], x, *tops)[:, :m, :d]  # fmt: skip
