"""One query per row over pages that lie anywhere: a list of steps, each of which reads up to `lanes` pages of a row.

The list holds live blocks only, and the grid is as long as the list, so that a row costs what it holds; of a row's
last block only the live pages are copied. While a step computes, the pages of the next one arrive, whichever row it
belongs to.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NEGATIVE = -1e30
# Entries that one step reads at most.
ENTRIES = 1024


class Steps(NamedTuple):
    """Per step, i32 [s]: its row; where its pages begin in `pages`, i32 [m]; entries of the row from there on. count,
    i32 []: steps that do something, at least 1."""

    row: jax.Array
    at: jax.Array
    left: jax.Array
    pages: jax.Array
    count: jax.Array


def steps_of(lengths_r: jax.Array, pages_m: jax.Array, first_r: jax.Array, page: int, lanes: int) -> Steps:
    """The steps of rows that hold lengths_r entries in the pages from first_r on."""
    rows = lengths_r.shape[0]
    blocks = -(-lengths_r // (page * lanes))
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    step = jnp.arange(pages_m.shape[0] // lanes + rows, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, step, side="right").astype(jnp.int32), rows - 1)
    within = step - (ends - blocks)[row]
    left = jnp.maximum(lengths_r[row] - within * page * lanes, 0)
    return Steps(row, first_r[row] + within * lanes, left, pages_m, jnp.maximum(ends[-1], 1))


def _step(row, at, left, pages, q_ref, *refs, lanes, quantized):
    n = 4 if quantized else 2
    sources, (o_ref, lse_ref), rest = refs[:n], refs[n : n + 2], refs[n + 2 :]
    buffers, (sems, top_ref, total_ref, sum_ref) = rest[: len(sources)], rest[len(sources) :]
    step, steps = pl.program_id(0), pl.num_programs(0)
    slot = jax.lax.rem(step, 2)
    page, size = buffers[0].shape[2:]

    def each_page(step: jax.Array, slot: jax.Array, act: str) -> None:
        def one(lane: jax.Array | int, _: None = None) -> None:
            here = pages[at[step] + lane]
            for i, (source, buffer) in enumerate(zip(sources, buffers)):
                copy = pltpu.make_async_copy(source.at[here], buffer.at[slot, lane], sems.at[i, slot])
                getattr(copy, act)()

        live = (left[step] + page - 1) // page

        @pl.when(live >= lanes)
        def _():
            # Without a loop the compiler can weave the copies' addresses together.
            for lane in range(lanes):
                one(lane)

        @pl.when(live < lanes)
        def _():
            jax.lax.fori_loop(0, live, one, None)

    @pl.when(step == 0)
    def _():
        # A weight of zero must not meet what the memory held before.
        for buffer in buffers:
            buffer[...] = jnp.zeros_like(buffer)
        each_page(step, slot, "start")

    @pl.when(step + 1 < steps)
    def _():
        each_page(step + 1, 1 - slot, "start")

    @pl.when((step == 0) | (row[step] != row[jnp.maximum(step - 1, 0)]))
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEGATIVE)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    each_page(step, slot, "wait")
    q = q_ref[...]
    k, v = (buffer[slot].reshape(lanes * page, size).astype(q.dtype) for buffer in buffers[:2])
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
    scores = dot(q, k, (((1,), (1,)), ((), ()))) * size**-0.5
    if quantized:
        k_scale, v_scale = (
            jnp.concatenate([buffer[slot, lane] for lane in range(lanes)], axis=1) for buffer in buffers[2:]
        )
        scores = scores * k_scale
    seen = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left[step]
    scores = jnp.where(seen, scores, NEGATIVE)
    old = top_ref[...]
    top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    shrink = jnp.exp(old - top)
    total = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    if quantized:
        weights = weights * v_scale
    mixed = shrink * sum_ref[...] + dot(weights.astype(q.dtype), v, (((1,), (0,)), ((), ())))
    top_ref[...], total_ref[...], sum_ref[...] = top, total, mixed
    o_ref[...] = mixed / jnp.maximum(total, 1e-30)
    lse_ref[...] = top + jnp.log(jnp.maximum(total, 1e-30))


def cache_attention(
    q_rgk: jax.Array,
    sources: tuple[jax.Array, ...],
    lengths_r: jax.Array,
    pages_m: jax.Array,
    first_r: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`ref.cache_attention` with the pages of row r at pages_m[first_r ...]. sources: keys and values [p, c, k], and
    their scales f32 [p, 1, c] where they are int8. Rows that hold nothing return anything."""
    r, g, size = q_rgk.shape
    page = sources[0].shape[1]
    lanes = max(1, ENTRIES // page)
    steps = steps_of(lengths_r, pages_m, first_r, page, lanes)
    held = sum(x.nbytes // x.shape[0] for x in sources) * pages_m.shape[0]

    def of_row(*tail: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, g, *tail), lambda step, row, at, left, pages: (row[step], 0, 0))

    out, lse = pl.pallas_call(
        functools.partial(_step, lanes=lanes, quantized=len(sources) == 4),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(steps.count,),
            in_specs=[of_row(size), *[pl.BlockSpec(memory_space=pl.ANY)] * len(sources)],
            out_specs=[of_row(size), of_row(1)],
            scratch_shapes=[
                *[pltpu.VMEM((2, lanes, *x.shape[1:]), x.dtype) for x in sources],
                pltpu.SemaphoreType.DMA((len(sources), 2)),
                *[pltpu.VMEM((g, width), jnp.float32) for width in (1, 1, size)],
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((r, g, width), jnp.float32) for width in (size, 1)],
        # Checks of every copy's bounds would double the bundles of a step.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * g * size * page * len(pages_m), bytes_accessed=held, transcendentals=g * page * len(pages_m)
        ),
        interpret=interpret,
        name="cache_attention",
    )(steps.row, steps.at, steps.left, steps.pages, q_rgk, *sources)  # fmt: skip
    return out, lse[..., 0]
