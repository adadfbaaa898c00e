"""Gradients of attention in one pass over the tiles, for TPU.

Queries stream past a block of keys, whose gradients add up in VMEM. Those of the queries add up in HBM, in float32: a
step computes its share, fetches what the steps before have left there while it still computes, and sends the sum back
while the next step computes. Scores are [keys, queries] here, so that log-sum-exps and segments of queries lie along
lanes as they are stored; what belongs to keys is spread over lanes once per block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.evict_attention.kernel import VMEM_BYTES
from pallas_kernels.evict_attention.plan import Plan, flat, unflat
from pallas_kernels.evict_attention.tiles import LANES, LOG2E, Form, Tile, column, dot, loop, tile_at, wide

# Heads of a group in one go: more only adds spills.
HEADS = 2


class _Refs(NamedTuple):
    """Blocks of inputs and outputs, and what adds up in VMEM. Without penalties or segments theirs are None."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    lse: Any
    delta: Any
    keep: Any
    q_seg: Any
    k_seg: Any
    # Whole, in HBM; it starts as zeros.
    d_q: Any
    d_k: Any
    d_v: Any
    d_keep: Any
    sum_q: Any
    sum_k: Any
    sum_v: Any
    buffer: Any
    bias: Any
    semaphores: Any
    pending: Any
    # Sums and penalties of keys, [keys, lanes]; 1 in `far` where a query is beyond the window.
    sum_keep: Any
    keep_column: Any
    far: Any
    segment_column: Any

    @classmethod
    def named(cls, refs: list[Any], form: Form) -> _Refs:
        """What a kernel receives, in the order of `backward`."""
        rest = iter(refs)
        take = lambda n, there=True: [next(rest) if there else None for _ in range(n)]  # noqa: E731
        inputs = take(6) + take(1, form.keep) + take(2, form.segments)
        # The zeros that d_q starts from are in the same memory as d_q.
        next(rest)
        outputs = take(3) + take(1, form.keep)
        return cls(*inputs, *outputs, *take(7), *take(3, form.keep), *take(1, form.segments))


def _kernel(*refs: Any, form: Form, widths: tuple[int, ...]) -> None:
    plan, x = unflat(refs[: len(widths)], widths), _Refs.named(list(refs[len(widths) :]), form)
    b, h, j, i = (pl.program_id(n) for n in range(4))
    row = b * pl.num_programs(1) + h
    last = pl.num_programs(3) - 1
    share = _Share(x, x.d_q.at[b, h, :, tile_at(i, form.blocks.q_block), :])

    @pl.when(i == 0)
    def _():
        _begin(x, form)

    @pl.when((i == 0) & (j == 0))
    def _():
        x.pending[0] = 0

    @pl.when((plan.q_first[row, j] <= i) & (i < plan.q_end[row, j]))
    def _():
        x.sum_q[...] = jnp.zeros_like(x.sum_q)
        queries = functools.partial(_queries, x, plan, form, share, (b, row, j, i))
        loop(0, form.blocks.q_block // form.blocks.q_tile, queries)
        share.send()

    @pl.when(i == last)
    def _():
        _end(x, form)

    pl.when((i == last) & (j == pl.num_programs(2) - 1))(share.sent)


class _Share:
    """The gradients of a block of queries in HBM, to which a step adds its share."""

    def __init__(self, x: _Refs, here: Any):
        self.x = x
        self.fetching = pltpu.make_async_copy(here, x.buffer, x.semaphores.at[0])
        self.sending = pltpu.make_async_copy(x.buffer, here, x.semaphores.at[1])

    def fetch(self) -> None:
        """Begins to fetch what the steps before have left, once their last sum has been sent."""
        self.sent()
        self.fetching.start()

    def send(self) -> None:
        """Adds what was fetched, and begins to send the sum."""
        self.fetching.wait()
        self.x.buffer[...] += self.x.sum_q[...]
        self.sending.start()
        self.x.pending[0] = 1

    def sent(self) -> None:
        """Waits for a sum that is on its way."""

        @pl.when(self.x.pending[0] == 1)
        def _():
            self.sending.wait()
            self.x.pending[0] = 0


def _begin(x: _Refs, form: Form) -> None:
    """Before the first queries of a block of keys."""
    x.sum_k[...] = jnp.zeros_like(x.sum_k)
    x.sum_v[...] = jnp.zeros_like(x.sum_v)
    if form.keep:
        x.sum_keep[...] = jnp.zeros_like(x.sum_keep)
        x.keep_column[...] = column(x.keep[...])
    if form.segments:
        x.segment_column[...] = column(x.k_seg[...])


def _end(x: _Refs, form: Form) -> None:
    """After the last queries of a block of keys."""
    x.d_k[...] = (x.sum_k[...] / LOG2E).astype(x.d_k.dtype)
    x.d_v[...] = x.sum_v[...].astype(x.d_v.dtype)
    if form.keep:
        x.d_keep[...] = x.sum_keep[...].sum(1, keepdims=True).T


def _queries(x: _Refs, plan: Plan, form: Form, share: _Share, step: tuple, r: jax.Array) -> None:
    """Tile r of queries with all tiles of keys that it sees. step: sequence, its row in the plan, blocks."""
    blocks, (b, row, j, i) = form.blocks, step
    q_tiles, k_tiles = blocks.q_block // blocks.q_tile, blocks.k_block // blocks.k_tile
    q_tile = i * q_tiles + r

    def keys(c: jax.Array) -> None:
        k_tile = j * k_tiles + c
        tile = Tile(plan.start[b] + q_tile * blocks.q_tile, k_tile * blocks.k_tile, form)
        kinds = tile.kinds(plan, b, row, q_tile, k_tile)
        _tile(x, form, tile, kinds, tile_at(r, blocks.q_tile), tile_at(c, blocks.k_tile))

    low = jnp.maximum(plan.first[b, q_tile] - j * k_tiles, 0)
    loop(low, jnp.minimum(plan.end[b, q_tile] - j * k_tiles, k_tiles), keys)
    pl.when(r == 0)(share.fetch)


def _tile(x: _Refs, form: Form, tile: Tile, kinds: tuple[jax.Array, ...], q_at: Any, k_at: Any) -> None:
    """One tile, of one of three kinds: every key is seen as it is; all are beyond the window; or anything else."""
    free, far, mixed = kinds
    g = x.q.shape[0]
    heads = HEADS if g % HEADS == 0 else 1

    def back(penalty: Any, where: Any) -> None:
        loop(0, g // heads, functools.partial(_heads, x, q_at, k_at, heads, penalty, where))

    pl.when(free)(lambda: back(None, None))
    if form.keep:
        spread = lambda: wide(x.keep_column[k_at, :], form.blocks.q_tile)  # noqa: E731
        pl.when(far)(lambda: back(spread, lambda d_scores: d_scores))

    @pl.when(mixed)
    def _():
        shape, segments = x.bias.shape, None
        if form.segments:
            segments = x.q_seg[:, q_at], wide(x.segment_column[k_at, :], shape[1])
        keep = wide(x.keep_column[k_at, :], shape[1]) if form.keep else None
        x.bias[...], beyond = tile.penalty(shape, 1, segments, keep)
        if form.keep:
            x.far[...] = beyond.astype(jnp.float32)
        back(lambda: x.bias[...], (lambda d_scores: d_scores * x.far[...]) if form.keep else None)


def _heads(x: _Refs, q_at: Any, k_at: Any, heads: int, penalty: Any, where: Any, n: jax.Array) -> None:
    """Gradients of a tile for the n-th `heads` heads of a group.

    penalty: makes what is added to scores; where: picks the gradients of scores that count for penalties; or None."""
    k, v = x.k[k_at, :], x.v[k_at, :]
    d_k = d_v = d_keep = 0.0
    for head in (n * heads + m for m in range(heads)):
        q, d_out = x.q[head, q_at, :], x.d_out[head, q_at, :]
        scores = dot(k, q, (1, 1))
        if penalty is not None:
            scores += penalty()
        weights = jnp.exp2(scores - x.lse[head, :, q_at])
        d_v += dot(weights.astype(v.dtype), d_out, (1, 0))
        d_scores = weights * (dot(v, d_out, (1, 1)) - x.delta[head, :, q_at])
        if where is not None:
            counted = where(d_scores)
            for lane in range(0, counted.shape[1], LANES):
                d_keep += counted[:, lane : lane + LANES]
        d_scores = d_scores.astype(q.dtype)
        d_k += dot(d_scores, q, (1, 0))
        x.sum_q[head, q_at, :] += dot(d_scores, k, (0, 0))
    x.sum_k[k_at, :] += d_k
    x.sum_v[k_at, :] += d_v
    if where is not None:
        x.sum_keep[k_at, : d_keep.shape[1]] += d_keep


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
