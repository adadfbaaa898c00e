"""Gradients of attention in one pass over the tiles, for TPU.

Queries stream past a block of keys, whose gradients add up in VMEM. Those of the queries add up in HBM, in float32: a
step computes its share, fetches what the steps before have left there while it still computes, and sends the sum back
while the next step computes. Scores are [keys, queries] here, so that log-sum-exps and segments of queries lie along
lanes as they are stored; what belongs to keys is spread over lanes once per block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.evict_attention.kernel import VMEM_BYTES
from pallas_kernels.evict_attention.plan import Plan, flat, unflat
from pallas_kernels.evict_attention.tiles import LANES, LOG2E, Form, Tile, column, dot, loop, tile_at, wide

# Heads of a group in one go: more only adds spills.
HEADS = 2


def _kernel(*refs: Any, form: Form, widths: tuple[int, ...]) -> None:
    plan, refs = unflat(refs[: len(widths)], widths), list(refs[len(widths) :])
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs[:6]
    keep_ref = refs.pop(6) if form.keep else None
    q_seg_ref, k_seg_ref = (refs.pop(6), refs.pop(6)) if form.segments else (None, None)
    # The zeros that d_q starts from are in the same memory as d_q.
    _, d_q_ref, d_k_ref, d_v_ref = refs[6:10]
    d_keep_ref = refs.pop(10) if form.keep else None
    sum_q, sum_k, sum_v, buffer, bias_ref, semaphores, pending = refs[10:17]
    sum_keep, keep_column, far_ref = refs[17:20] if form.keep else (None, None, None)
    segment_column = refs[-1] if form.segments else None
    b, h, j, i = (pl.program_id(n) for n in range(4))
    row = b * pl.num_programs(1) + h
    last = pl.num_programs(3) - 1
    blocks = form.blocks
    g = q_ref.shape[0]
    heads = HEADS if g % HEADS == 0 else 1
    q_tiles, k_tiles = blocks.q_block // blocks.q_tile, blocks.k_block // blocks.k_tile
    here = d_q_ref.at[b, h, :, tile_at(i, blocks.q_block), :]
    fetch = pltpu.make_async_copy(here, buffer, semaphores.at[0])
    send = pltpu.make_async_copy(buffer, here, semaphores.at[1])

    @pl.when(i == 0)
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)
        if form.keep:
            sum_keep[...] = jnp.zeros_like(sum_keep)
            keep_column[...] = column(keep_ref[...])
        if form.segments:
            segment_column[...] = column(k_seg_ref[...])

    @pl.when((i == 0) & (j == 0))
    def _():
        pending[0] = 0

    def sent() -> None:
        @pl.when(pending[0] == 1)
        def _():
            send.wait()
            pending[0] = 0

    def queries(r: jax.Array) -> None:
        q_tile, q_at = i * q_tiles + r, tile_at(r, blocks.q_tile)

        def keys(c: jax.Array) -> None:
            k_tile, k_at = j * k_tiles + c, tile_at(c, blocks.k_tile)
            tile = Tile(plan.start[b] + q_tile * blocks.q_tile, k_tile * blocks.k_tile, form)
            free, far, mixed = tile.kinds(plan, b, row, q_tile, k_tile)

            def back(penalty: Any, where: Any) -> None:
                loop(0, g // heads, functools.partial(some, penalty, where))

            def some(penalty: Any, where: Any, n: jax.Array) -> None:
                k, v = k_ref[k_at, :], v_ref[k_at, :]
                d_k = d_v = d_keep = 0.0
                for x in range(heads):
                    head = n * heads + x
                    q, d_out = q_ref[head, q_at, :], d_out_ref[head, q_at, :]
                    scores = dot(k, q, (1, 1))
                    if penalty is not None:
                        scores += penalty()
                    weights = jnp.exp2(scores - lse_ref[head, :, q_at])
                    d_v += dot(weights.astype(v.dtype), d_out, (1, 0))
                    d_scores = weights * (dot(v, d_out, (1, 1)) - delta_ref[head, :, q_at])
                    if where is not None:
                        counted = where(d_scores)
                        for lane in range(0, blocks.q_tile, LANES):
                            d_keep += counted[:, lane : lane + LANES]
                    d_scores = d_scores.astype(q.dtype)
                    d_k += dot(d_scores, q, (1, 0))
                    sum_q[head, q_at, :] += dot(d_scores, k, (0, 0))
                sum_k[k_at, :] += d_k
                sum_v[k_at, :] += d_v
                if where is not None:
                    sum_keep[k_at, : d_keep.shape[1]] += d_keep

            pl.when(free)(lambda: back(None, None))
            if form.keep:
                spread = lambda: wide(keep_column[k_at, :], blocks.q_tile)  # noqa: E731
                pl.when(far)(lambda: back(spread, lambda x: x))

            @pl.when(mixed)
            def _():
                shape, segments = bias_ref.shape, None
                if form.segments:
                    segments = q_seg_ref[:, q_at], wide(segment_column[k_at, :], shape[1])
                keep = wide(keep_column[k_at, :], shape[1]) if form.keep else None
                bias_ref[...], beyond = tile.penalty(shape, 1, segments, keep)
                if form.keep:
                    far_ref[...] = beyond.astype(jnp.float32)
                back(lambda: bias_ref[...], (lambda x: x * far_ref[...]) if form.keep else None)

        low = jnp.maximum(plan.first[b, q_tile] - j * k_tiles, 0)
        loop(low, jnp.minimum(plan.end[b, q_tile] - j * k_tiles, k_tiles), keys)

        @pl.when(r == 0)
        def _():
            sent()
            fetch.start()

    @pl.when((plan.q_first[row, j] <= i) & (i < plan.q_end[row, j]))
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)
        loop(0, q_tiles, queries)
        fetch.wait()
        buffer[...] += sum_q[...]
        send.start()
        pending[0] = 1

    @pl.when(i == last)
    def _():
        d_k_ref[...] = (sum_k[...] / LOG2E).astype(d_k_ref.dtype)
        d_v_ref[...] = sum_v[...].astype(d_v_ref.dtype)
        if form.keep:
            d_keep_ref[...] = sum_keep[...].sum(1, keepdims=True).T

    pl.when((i == last) & (j == pl.num_programs(2) - 1))(sent)


def backward(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    d_out_bhgtk: jax.Array,
    lse_bhgt: jax.Array,
    delta_bhgt: jax.Array,
    keep_bh1s: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    plan: Plan,
    form: Form,
) -> tuple[jax.Array, ...]:
    """Gradients f32 [b, h, g, t, k] of queries (before the division by sqrt(k)), [b, h, s, k] of keys and of values,
    and with `keep_bh1s` f32 [b, h, 1, s] of penalties.

    Inputs as in `kernel.forward`; lse in units of log 2, large where a query saw nothing; delta is the product of
    output and its gradient, less the gradient of the log-sum-exp."""
    b, h, g, t, k = q_bhgtk.shape
    s = k_bhsk.shape[2]
    q_block, k_block = form.blocks.q_block, form.blocks.k_block
    widths = tuple(x.shape[-1] for x in plan)
    grid = (b, h, s // k_block, t // q_block)

    def block(b: Any, h: Any, j: Any, i: Any, *plan: Any) -> Any:
        row = b * grid[1] + h
        plan = unflat(plan, widths)
        return jnp.clip(i, plan.q_first[row, j], jnp.maximum(plan.q_end[row, j] - 1, plan.q_first[row, j]))

    queries = pl.BlockSpec((None, None, g, q_block, k), lambda *at: (at[0], at[1], 0, block(*at), 0))
    rows = pl.BlockSpec((None, None, g, 1, q_block), lambda *at: (at[0], at[1], 0, 0, block(*at)))
    keys = pl.BlockSpec((None, None, k_block, k), lambda b, h, j, i, *_: (b, h, j, 0))
    of_keys = pl.BlockSpec((None, None, 1, k_block), lambda b, h, j, i, *_: (b, h, 0, j))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # Heads lie outside of a vector's eight rows, so that any of them can be loaded.
    inputs = [q_bhgtk, k_bhsk, v_bhsk, d_out_bhgtk, lse_bhgt[:, :, :, None], delta_bhgt[:, :, :, None]]
    specs = [queries, keys, keys, queries, rows, rows]
    outputs = [jax.ShapeDtypeStruct(q_bhgtk.shape, jnp.float32)]
    outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_bhsk, v_bhsk)]
    out_specs = [anywhere, keys, keys]
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    tile = (form.blocks.k_tile, form.blocks.q_tile)
    scratch = [f32((g, q_block, k)), f32((k_block, k)), f32((k_block, k)), f32((g, q_block, k)), f32(tile)]
    scratch += [pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)]
    if form.keep:
        inputs.append(keep_bh1s)
        specs.append(of_keys)
        outputs.append(jax.ShapeDtypeStruct(keep_bh1s.shape, jnp.float32))
        out_specs.append(of_keys)
        scratch += [f32((k_block, LANES)), f32((k_block, LANES)), f32(tile)]
    if form.segments:
        inputs += segments
        specs.append(pl.BlockSpec((None, 1, q_block), lambda *at: (at[0], 0, block(*at))))
        specs.append(pl.BlockSpec((None, 1, k_block), lambda b, h, j, i, *_: (b, 0, j)))
        scratch.append(pltpu.VMEM((k_block, LANES), jnp.int32))
    scores = b * h * g * t * s // 2
    return pl.pallas_call(
        functools.partial(_kernel, form=form, widths=widths),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan), grid=grid, in_specs=[*specs, anywhere], out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        input_output_aliases={len(plan) + len(inputs): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * scores * k,
            transcendentals=scores,
            bytes_accessed=4 * k_bhsk.nbytes + (s // k_block) * q_bhgtk.size * (2 * q_bhgtk.dtype.itemsize + 8),
        ),
        interpret=form.interpret,
        name="evict_attention_back",
    )(*flat(plan), *inputs, jnp.zeros(q_bhgtk.shape, jnp.float32))  # fmt: skip
