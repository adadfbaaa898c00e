"""Mamba-2's dual form: scores of a block once for all heads, the state of many heads side by side in VMEM.

Heads lie next to each other along lanes as they come, several to a tile of 128; what belongs to one head is picked by
its lanes, so that nothing is transposed. Time steps and decays, sixty-fourths of the rest, come laid out twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import pad_axis, round_up
from pallas_kernels.ssd_chunk.ref import Parts, decay, padded

BLOCK = 128
# Lanes of heads that a step handles at most.
WIDTH = 1024


def _step(columns_ref, rows_ref, document_ref, x_ref, b_ref, c_ref, s0_ref, y_ref, s_ref, *, size):
    @pl.when(pl.program_id(2) == 0)
    def _():
        s_ref[...] = s0_ref[...]

    dtype = x_ref.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
    plain, lanes_both, rows_both = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    heads = rows_ref.shape[0]
    columns = columns_ref[...]
    step, fed_until, since, total = (columns[:, i * heads : (i + 1) * heads] for i in range(4))

    document = jnp.broadcast_to(document_ref[...], (BLOCK, BLOCK))
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    seen = (document == document.T) & (i >= j)
    b, c = b_ref[...], c_ref[...]
    scores = jnp.where(seen, dot(c, b, lanes_both), 0.0)

    tile = max(size, 128)
    per_tile = tile // size
    lane_head = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, tile), 1) // size

    def spread(x: jax.Array, first: int) -> jax.Array:
        """Columns first, first + 1, ... of x, each over the lanes of its head."""
        out = jnp.broadcast_to(x[:, first : first + 1], (x.shape[0], tile))
        for n in range(1, per_tile):
            out = jnp.where(lane_head[: x.shape[0]] == n, x[:, first + n : first + n + 1], out)
        return out

    for first in range(0, heads, per_tile):
        lanes = slice(first * size, first * size + tile)
        x, s = x_ref[:, lanes].astype(jnp.float32), s_ref[:, lanes]
        fed = (x * spread(step, first)).astype(dtype)
        y = dot(c, s.astype(dtype), plain) * spread(since, first)
        for n in range(per_tile):
            h = first + n
            within = jnp.exp(jnp.minimum(total[:, h : h + 1] - rows_ref[h : h + 1, :], 0.0))
            one = dot((scores * within).astype(dtype), fed, plain)
            y = y + jnp.where(lane_head == n, one, 0.0)
        y_ref[:, lanes] = y
        new = dot(b, (x * spread(fed_until, first)).astype(dtype), rows_both)
        s_ref[:, lanes] = s * spread(since[BLOCK - 1 :], first) + new


def ssd(parts: Parts, s_bhkn: jax.Array, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """`ref.ssd`, in blocks of BLOCK positions."""
    (bs, t, h, k), n = parts[0].shape, parts[3].shape[2]
    # Sizes that divide or fill tiles of 128 lanes, and whole tiles of heads.
    size = round_up(k, 128) if k > 128 else 1 << (k - 1).bit_length()
    per_tile = max(1, 128 // size)
    all_heads = round_up(h, per_tile)
    heads = next(
        i for i in range(all_heads, 0, -per_tile) if all_heads % i == 0 and (i * size <= WIDTH or i == per_tile)
    )
    groups = all_heads // heads

    x, dt, log, b, c, document = padded(parts, BLOCK)
    long = document.shape[1]
    blocks = (bs, long // BLOCK, BLOCK)
    total = jnp.cumsum(log.reshape(*blocks, h), axis=2)
    document_bij = document.reshape(blocks)
    before = jnp.pad(document_bij[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    since = decay(total, (document_bij == before)[..., None])
    until = decay(total[:, :, -1:] - total, (document_bij == document_bij[:, :, -1:])[..., None])
    columns = jnp.stack([dt, dt * until.reshape(dt.shape), since.reshape(dt.shape), total.reshape(dt.shape)], axis=2)
    columns = pad_axis(columns, 3, per_tile).reshape(bs, long, 4, groups, heads)
    columns = columns.transpose(0, 3, 1, 2, 4).reshape(bs, groups, long, 4 * heads)
    rows = columns[..., 3 * heads :].swapaxes(2, 3)

    def in_lanes(a: jax.Array) -> jax.Array:
        return pad_axis(pad_axis(a, 3, size), 2, per_tile).reshape(*a.shape[:2], all_heads * size)

    b, c = (pad_axis(a, 2, 128) for a in (b, c))
    s0 = pad_axis(in_lanes(s_bhkn.transpose(0, 3, 1, 2)), 1, 128)
    width = heads * size
    positions = pl.BlockSpec((None, BLOCK, width), lambda i, g, j: (i, j, g))
    shared = pl.BlockSpec((None, BLOCK, b.shape[2]), lambda i, g, j: (i, j, 0))
    states = pl.BlockSpec((None, b.shape[2], width), lambda i, g, j: (i, 0, g))
    y, s = pl.pallas_call(
        functools.partial(_step, size=size),
        grid=(bs, groups, long // BLOCK),
        in_specs=[
            pl.BlockSpec((None, None, BLOCK, 4 * heads), lambda i, g, j: (i, g, j, 0)),
            pl.BlockSpec((None, None, heads, BLOCK), lambda i, g, j: (i, g, 0, j)),
            pl.BlockSpec((None, 1, BLOCK), lambda i, g, j: (i, 0, j)),
            positions, shared, shared, states,
        ],
        out_specs=[positions, states],
        out_shape=[
            jax.ShapeDtypeStruct((bs, long, all_heads * size), jnp.float32),
            jax.ShapeDtypeStruct(s0.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * bs * t * h * k * (BLOCK + 2 * n), transcendentals=bs * t * h * BLOCK,
            bytes_accessed=bs * t * h * (k * (x.dtype.itemsize + 4) + 20) + 8 * s0.size,
        ),
        interpret=interpret,
        name="ssd_chunk",
    )(columns, rows, document[:, None], in_lanes(x), b, c, s0)  # fmt: skip
    y = y.reshape(bs, long, all_heads, size)[:, :t, :h, :k]
    s = s[:, :n].reshape(bs, n, all_heads, size)[:, :, :h, :k]
    return y, s.transpose(0, 2, 3, 1)
