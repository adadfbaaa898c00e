"""One query per row over pages that lie anywhere: a list of steps, each of which reads up to `lanes` pages of a row.

The list holds live blocks only, and the grid is as long as the list, so that a row costs what it holds; of a row's
last block only the live pages are copied. While a step computes, the pages of the next one arrive, whichever row it
belongs to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import NEGATIVE

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


class _Copies(NamedTuple):
    """Pages on their way from the pool to the buffers [2, lanes, ...], one slot of which is read while the other one
    fills. Semaphores [sources, 2] count bytes."""

    at: Any
    left: Any
    pages: Any
    sources: Sequence[Any]
    buffers: Sequence[Any]
    sems: Any

    @property
    def lanes(self) -> int:
        """Pages of a whole step."""
        return self.buffers[0].shape[1]

    def live(self, step: jax.Array) -> jax.Array:
        """Pages that a step copies."""
        page = self.buffers[0].shape[2]
        return jnp.minimum(jax.lax.div(self.left[step] + page - 1, page), self.lanes)

    def of_page(self, step: jax.Array, lane: jax.Array | int) -> list[Any]:
        """The copies of one page, one per source."""
        page, slot = self.pages[self.at[step] + lane], jax.lax.rem(step, 2)
        return [
            pltpu.make_async_copy(source.at[page], buffer.at[slot, lane], self.sems.at[i, slot])
            for i, (source, buffer) in enumerate(zip(self.sources, self.buffers))
        ]

    def each(self, step: jax.Array, act: str) -> None:
        """Starts or waits for the copies of a step, page by page."""

        def one(lane: jax.Array, _: None) -> None:
            for copy in self.of_page(step, lane):
                getattr(copy, act)()

        jax.lax.fori_loop(0, self.live(step), one, None)

    def start(self, step: jax.Array) -> None:
        """Starts the copies of a step."""
        whole = self.live(step) == self.lanes

        @pl.when(whole)
        def _():
            # Without a loop the compiler can weave the copies' addresses together.
            for lane in range(self.lanes):
                for copy in self.of_page(step, lane):
                    copy.start()

        @pl.when(jnp.logical_not(whole))
        def _():
            self.each(step, "start")

    def wait(self, step: jax.Array) -> None:
        """Returns when the pages of a step are there."""
        whole, slot = self.live(step) == self.lanes, jax.lax.rem(step, 2)

        @pl.when(whole)
        def _():
            for i, buffer in enumerate(self.buffers):
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.sems.at[i, slot]).wait()

        @pl.when(jnp.logical_not(whole))
        def _():
            self.each(step, "wait")

    def clear(self) -> None:
        """Fills the buffers with zeros."""

        def one(lane: jax.Array, _: None) -> None:
            for buffer in self.buffers:
                buffer[:, lane] = jnp.zeros((2, *buffer.shape[2:]), buffer.dtype)

        jax.lax.fori_loop(0, self.lanes, one, None)


def _step(row, at, left, pages, q_ref, *refs, quantized):
    n = 4 if quantized else 2
    sources, (o_ref, lse_ref), rest = refs[:n], refs[n : n + 2], refs[n + 2 :]
    buffers, (sems, top_ref, total_ref, sum_ref) = rest[:n], rest[n:]
    copies = _Copies(at, left, pages, sources, buffers, sems)
    step, slot = pl.program_id(0), jax.lax.rem(pl.program_id(0), 2)
    lanes, page, size = buffers[0].shape[1:]

    @pl.when(step == 0)
    def _():
        # A weight of zero must not meet what the memory held before.
        copies.clear()
        copies.each(step, "start")

    @pl.when(step + 1 < pl.num_programs(0))
    def _():
        copies.start(step + 1)

    @pl.when((step == 0) | (row[step] != row[jnp.maximum(step - 1, 0)]))
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEGATIVE)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    copies.wait(step)
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
        functools.partial(_step, quantized=len(sources) == 4),
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
