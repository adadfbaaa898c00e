"""Attention forward in tiles with a running softmax (FlashAttention-2, arXiv 2307.08691), for TPU.

A grid step holds a block of queries of all heads of one group and a block of keys; keys stream past the queries.
Scores are in units of log 2: queries come multiplied by log2(e) / sqrt(k). The running maximum is kept in all 128
lanes; the running sum is kept per lane and added up once, at the end. The maximum starts at NOTHING, far above what
is masked, so that masked scores have a weight of exactly 0 even in a row that has no others.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.evict_attention.plan import Plan, flat, unflat
from pallas_kernels.evict_attention.ref import NEGATIVE, NOTHING
from pallas_kernels.evict_attention.tiles import LANES, LOG2E, Form, Tile, at_once, column, dot, loop, tile_at, wide

VMEM_BYTES = 48 * 2**20


def _kernel(*refs: Any, form: Form, widths: tuple[int, ...]) -> None:
    plan, refs = unflat(refs[: len(widths)], widths), list(refs[len(widths) :])
    q_ref, k_ref, v_ref = refs[:3]
    keep_ref = refs.pop(3) if form.keep else None
    q_seg_ref, k_seg_ref = (refs.pop(3), refs.pop(3)) if form.segments else (None, None)
    out_ref, lse_ref, top_ref, total_ref, sum_ref, bias_ref = refs[3:9]
    column_ref = refs[9] if form.segments else None
    b, h, i, j = (pl.program_id(n) for n in range(4))
    row = b * pl.num_programs(1) + h
    blocks = form.blocks
    g = q_ref.shape[0]
    heads = at_once(g)
    q_tiles, k_tiles = blocks.q_block // blocks.q_tile, blocks.k_block // blocks.k_tile

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NOTHING)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if form.segments:
            column_ref[...] = column(q_seg_ref[...])

    def queries(r: jax.Array) -> None:
        q_tile, q_at = i * q_tiles + r, tile_at(r, blocks.q_tile)

        def keys(c: jax.Array) -> None:
            k_tile, k_at = j * k_tiles + c, tile_at(c, blocks.k_tile)
            tile = Tile(plan.start[b] + q_tile * blocks.q_tile, k_tile * blocks.k_tile, form)
            free, far, mixed = tile.kinds(plan, b, row, q_tile, k_tile)

            def attend(penalty: Any) -> None:
                def some(n: Any) -> None:
                    k, v = k_ref[k_at, :], v_ref[k_at, :]
                    for head in range(heads):
                        at = (n * heads + head, q_at, slice(None))
                        scores = dot(q_ref[at], k, (1, 1))
                        if penalty is not None:
                            scores += penalty()
                        _update(scores, v, top_ref, total_ref, sum_ref, at)

                some(0) if g == heads else loop(0, g // heads, some)

            pl.when(free)(lambda: attend(None))
            if form.keep:
                pl.when(far)(lambda: attend(lambda: keep_ref[:, k_at]))

            @pl.when(mixed)
            def _():
                shape, segments = bias_ref.shape, None
                if form.segments:
                    segments = wide(column_ref[q_at, :], shape[1]), k_seg_ref[:, k_at]
                bias_ref[...] = tile.penalty(shape, 0, segments, keep_ref[:, k_at] if form.keep else None)[0]
                attend(lambda: bias_ref[...])

        low = jnp.maximum(plan.first[b, q_tile] - j * k_tiles, 0)
        loop(low, jnp.minimum(plan.end[b, q_tile] - j * k_tiles, k_tiles), keys)

    loop(0, q_tiles, queries)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        def finish(n: jax.Array) -> None:
            def some(r: jax.Array) -> None:
                at = (n, tile_at(r, blocks.q_tile), slice(None))
                total = total_ref[at].sum(-1, keepdims=True)
                out_ref[at] = (sum_ref[at] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
                lse = top_ref[at] / LOG2E + jnp.log(jnp.where(total > 0, total, 1.0))
                total_ref[at] = jnp.where(total > 0, lse, NEGATIVE)

            loop(0, q_tiles, some)
            lse_ref[pl.ds(n, 1), :] = total_ref[n].T[:1]

        loop(0, g, finish)


def _update(scores: jax.Array, v: jax.Array, top_ref: Any, total_ref: Any, sum_ref: Any, at: tuple) -> None:
    """Adds the keys of a tile to the running maximum, weights and weighted sum of its queries."""
    before = top_ref[at]
    top = jnp.maximum(before, scores.max(-1, keepdims=True))
    weights = jnp.exp2(scores - wide(top, scores.shape[1]))
    shrink = jnp.exp2(before - top)
    total = total_ref[at] * shrink
    for lane in range(0, scores.shape[1], LANES):
        total += weights[:, lane : lane + LANES]
    top_ref[at], total_ref[at] = top, total
    sum_ref[at] = sum_ref[at] * wide(shrink, sum_ref.shape[-1]) + dot(weights.astype(v.dtype), v, (1, 0))


def forward(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    keep_bh1s: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    plan: Plan,
    form: Form,
) -> tuple[jax.Array, jax.Array]:
    """Output [b, h, g, t, k] and log-sum-exp f32 [b, h, g, t] for whole blocks of queries and keys. Queries are
    multiplied by log2(e) / sqrt(k) and penalties by log2(e); segments are [b, 1, t] and [b, 1, s]."""
    b, h, g, t, k = q_bhgtk.shape
    q_block, k_block = form.blocks.q_block, form.blocks.k_block
    widths = tuple(x.shape[-1] for x in plan)
    grid = (b, h, t // q_block, k_bhsk.shape[2] // k_block)

    def block(b: Any, h: Any, i: Any, j: Any, plan: Plan) -> Any:
        """The block of keys to hold in step j: the next that is wanted, so that nothing is fetched in vain."""
        if form.keep:
            near = jnp.maximum(plan.start[b] + i * q_block - form.keep_window, 0) // k_block
            j = jnp.maximum(j, jnp.minimum(plan.alive[b * grid[1] + h, j], near))
        return jnp.clip(j, plan.block_first[b, i], jnp.maximum(plan.block_end[b, i] - 1, 0))

    def keys(b: Any, h: Any, i: Any, j: Any, *plan: Any) -> tuple:
        return b, h, block(b, h, i, j, unflat(plan, widths)), 0

    queries = pl.BlockSpec((None, None, g, q_block, k), lambda b, h, i, j, *_: (b, h, 0, i, 0))
    keys_spec = pl.BlockSpec((None, None, k_block, k), keys)
    inputs, specs = [q_bhgtk, k_bhsk, v_bhsk], [queries, keys_spec, keys_spec]
    if form.keep:
        inputs.append(keep_bh1s)
        specs.append(pl.BlockSpec((None, None, 1, k_block), lambda *at: (at[0], at[1], 0, keys(*at)[2])))
    if form.segments:
        inputs += segments
        specs.append(pl.BlockSpec((None, 1, q_block), lambda b, h, i, j, *_: (b, 0, i)))
        specs.append(pl.BlockSpec((None, 1, k_block), lambda *at: (at[0], 0, keys(*at)[2])))
    scratch = [(g, q_block, LANES), (g, q_block, LANES), (g, q_block, k), (form.blocks.q_tile, form.blocks.k_tile)]
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
    if form.segments:
        scratch.append(pltpu.VMEM((q_block, LANES), jnp.int32))
    scores = b * h * g * t * k_bhsk.shape[2] // 2
    return pl.pallas_call(
        functools.partial(_kernel, form=form, widths=widths),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=grid,
            in_specs=specs,
            out_specs=[queries, pl.BlockSpec((None, None, g, q_block), lambda b, h, i, j, *_: (b, h, 0, i))],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_bhgtk.shape, q_bhgtk.dtype),
            jax.ShapeDtypeStruct(q_bhgtk.shape[:4], jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * k,
            transcendentals=scores,
            bytes_accessed=2 * q_bhgtk.nbytes + 2 * k_bhsk.nbytes * (t // q_block),
        ),
        interpret=form.interpret,
        name="evict_attention",
    )(*flat(plan), *inputs)
