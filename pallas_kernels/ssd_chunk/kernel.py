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

from pallas_kernels.products import LANES_BOTH, PLAIN, ROWS_BOTH, products
from pallas_kernels.ssd_chunk.layout import BLOCK, Blocks, Form, Specs
from pallas_kernels.ssd_chunk.ref import Parts


def split(columns: jax.Array, form: Form) -> list[jax.Array]:
    """f32 [BLOCK, heads] each: time steps, their products with the decay until the block ends, that decay, the decay
    since it began, and the exponent of the last."""
    return [columns[:, i * form.heads : (i + 1) * form.heads] for i in range(5)]


def _step(columns_ref, rows_ref, document_ref, x_ref, b_ref, c_ref, s0_ref, y_ref, s_ref, *, form):
    @pl.when(pl.program_id(2) == 0)
    def _():
        s_ref[...] = s0_ref[...]

    dtype = x_ref.dtype
    dot = products(dtype)
    step, fed_until, _, since, total = split(columns_ref[...], form)

    document = jnp.broadcast_to(document_ref[...], (BLOCK, BLOCK))
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    seen = (document == document.T) & (i >= j)
    b, c = b_ref[...], c_ref[...]
    scores = jnp.where(seen, dot(c, b, LANES_BOTH), 0.0)

    for first, lanes in form.tiles():
        x, s = x_ref[:, lanes].astype(jnp.float32), s_ref[:, lanes]
        fed = (x * form.spread(step, first)).astype(dtype)
        y = dot(c, s.astype(dtype), PLAIN) * form.spread(since, first)
        for n in range(form.per_tile):
            h = first + n
            within = jnp.exp(jnp.minimum(total[:, h : h + 1] - rows_ref[h : h + 1, :], 0.0))
            one = dot((scores * within).astype(dtype), fed, PLAIN)
            y = y + jnp.where(form.lane_head() == n, one, 0.0)
        y_ref[:, lanes] = y
        new = dot(b, (x * form.spread(fed_until, first)).astype(dtype), ROWS_BOTH)
        s_ref[:, lanes] = s * form.spread(since[BLOCK - 1 :], first) + new


def ssd(parts: Parts, s_bhkn: jax.Array, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """`ref.ssd`, in blocks of BLOCK positions."""
    form, t = Form.of(parts), parts[-1].shape[1]
    blocks, s0 = Blocks.of(parts, form), form.state(s_bhkn)
    specs = Specs.of(form, blocks.count)
    long = blocks.document.shape[2]
    size = s0.shape[0] * t * form.h * form.k
    y, s = pl.pallas_call(
        functools.partial(_step, form=form),
        grid=(s0.shape[0], form.groups, blocks.count),
        in_specs=[*specs.inputs, specs.state],
        out_specs=[specs.positions, specs.state],
        out_shape=[
            jax.ShapeDtypeStruct((s0.shape[0], long, s0.shape[2]), jnp.float32),
            jax.ShapeDtypeStruct(s0.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * size * (BLOCK + 2 * form.n), transcendentals=size // form.k * BLOCK,
            bytes_accessed=size * (blocks.x.dtype.itemsize + 4) + size // form.k * 20 + 8 * s0.size,
        ),
        interpret=interpret,
        name="ssd_chunk",
    )(*blocks.inputs(), s0)  # fmt: skip
    return form.from_lanes(y)[:, :t], form.from_state(s)
