"""Vectors of chunks read by positions, as products with matrices of zeros and ones.

Readers' indices never decrease, so a tile of positions reads from a run of tiles of chunks; every such pair of tiles
is one step. A row of the matrix has a single one, so that the product is the vector itself.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import pad_axis
from pallas_kernels.select import select
from pallas_kernels.visits import readers, visits

# Positions, chunks and features of a tile.
POSITIONS, CHUNKS, WIDTH = 256, 128, 512


def width(d: int) -> int:
    """Features of a tile where there are d, a multiple of 128."""
    return next(w for w in range(min(d, WIDTH), 0, -128) if d % w == 0)


def _step(output, source, count, read_ref, x_ref, z_ref, *refs, steps):
    *only, y_ref = refs
    row, step = pl.program_id(0), pl.program_id(2)
    at = row * steps + step
    read_1t = read_ref[...]

    def chunk(n: int, first: jax.Array | int) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (n, POSITIONS), 0) + first

    begins = (step == 0) | (output[at] != output[jnp.maximum(at - 1, 0)])

    @pl.when(begins)
    def _():
        z = jnp.broadcast_to(z_ref[...].astype(jnp.float32), (16, z_ref.shape[1])).astype(x_ref.dtype)
        y_ref[...] = select((chunk(16, 0) == 0) & (read_1t < 0), z, 0).astype(y_ref.dtype)

    @pl.when(step < count[row])
    def _():
        chosen = chunk(CHUNKS, source[at] * CHUNKS) == read_1t
        found = select(chosen, x_ref[...], 0)
        if only:
            value, top = (ref[...] for ref in only)
            found = jnp.where(value == select(chosen, top, 0).astype(value.dtype), found, 0.0)
        y_ref[...] += found.astype(y_ref.dtype)


def unpool(
    x_bmd: jax.Array,
    z_bd: jax.Array,
    read_bt: jax.Array,
    interpret: Any = False,
    only: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """`ref.read_chunks` of x [b, m, d]; with `only`, values [b, t, d] and tops [b, m, d], zeros but where the value
    of a position equals the top of its chunk."""
    (b, m, d), t = x_bmd.shape, read_bt.shape[1]
    x = pad_axis(pad_axis(x_bmd, 1, CHUNKS), 2, 128)
    z = pad_axis(z_bd[:, None], 2, 128)
    read = pad_axis(read_bt.astype(jnp.int32), 1, POSITIONS, -1)
    t_tiles, m_tiles, w = read.shape[1] // POSITIONS, x.shape[1] // CHUNKS, width(x.shape[2])
    steps = t_tiles + m_tiles
    order = jax.lax.cummax(jnp.maximum(read, 0), axis=1).reshape(b, t_tiles, POSITIONS)
    found = visits(*readers(order, CHUNKS, m_tiles), steps)

    def tile(rows: int, which: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, w), lambda i, j, s, *lists: (i, lists[which][i * steps + s], j))

    extra = [] if only is None else [
        pad_axis(pad_axis(a, 1, rows), 2, 128) for a, rows in zip(only, (POSITIONS, CHUNKS))
    ]  # fmt: skip
    y = pl.pallas_call(
        functools.partial(_step, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, x.shape[2] // w, steps),
            in_specs=[
                pl.BlockSpec((None, 1, POSITIONS), lambda i, j, s, output, *_: (i, 0, output[i * steps + s])),
                tile(CHUNKS, 1),
                pl.BlockSpec((None, 1, w), lambda i, j, s, *_: (i, 0, j)),
                *[tile(POSITIONS, 0), tile(CHUNKS, 1)][: len(extra)],
            ],
            out_specs=tile(POSITIONS, 0),
        ),
        out_shape=jax.ShapeDtypeStruct((b, read.shape[1], x.shape[2]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * steps * POSITIONS * CHUNKS * d, transcendentals=0,
            bytes_accessed=x.dtype.itemsize * b * (m + t) * d + 4 * b * t,
        ),
        interpret=interpret,
        name="chunk_unpool",
    )(*found, read[:, None], x, z, *extra)  # fmt: skip
    return y[:, :t, :d]
