"""Gradients of Mamba-2's scan, block after block from the last.

With E_ij = w_ij dt_j <dy_i, x_j>, w_ij = exp(T_i - T_j) <c_i, b_j> and T the sums of log decays within a block, T_i
receives the sum of E_ij over j less that of E_ki over k. Both sums are of the same rounded w_ij, so that pairs on one
side of a decay cancel in its gradient. The states at which blocks begin are computed again, in float32; scores are
[j, i] here, so that no product but one per block needs them turned.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.products import LANES_BOTH, PLAIN, ROWS_BOTH, products
from pallas_kernels.select import select
from pallas_kernels.ssd_chunk.kernel import split
from pallas_kernels.ssd_chunk.layout import BLOCK, Blocks, Form, Specs
from pallas_kernels.ssd_chunk.ref import Parts

SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _states_step(columns_ref, x_ref, b_ref, s0_ref, states_ref, s_ref, *, form):
    @pl.when(pl.program_id(2) == 0)
    def _():
        s_ref[...] = s0_ref[...]

    states_ref[...] = s_ref[...]
    dtype = x_ref.dtype
    _, fed_until, _, since, _ = split(columns_ref[...], form)
    for first, lanes in form.tiles():
        fed = x_ref[:, lanes].astype(jnp.float32) * form.spread(fed_until, first)
        new = products(dtype)(b_ref[...], fed.astype(dtype), ROWS_BOTH)
        s_ref[:, lanes] = s_ref[:, lanes] * form.spread(since[BLOCK - 1 :], first) + new


def _states(blocks: Blocks, s0: jax.Array, form: Form, interpret: Any) -> jax.Array:
    """The state before every block, f32 [b, blocks, n, lanes]."""
    specs = Specs.of(form, blocks.count)
    columns, positions, b = (specs.inputs[i] for i in (0, 3, 4))
    shape = (s0.shape[0], blocks.count, *s0.shape[1:])
    return pl.pallas_call(
        functools.partial(_states_step, form=form),
        grid=(s0.shape[0], form.groups, blocks.count),
        in_specs=[columns, positions, b, specs.state],
        out_specs=specs.states,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((s0.shape[1], form.width), jnp.float32)],
        compiler_params=SEMANTICS,
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks.x.size * s0.shape[1], transcendentals=0,
            bytes_accessed=blocks.x.nbytes + 4 * s0.size * blocks.count,
        ),
        interpret=interpret,
        name="ssd_chunk_states",
    )(blocks.columns, blocks.x, blocks.b, s0)  # fmt: skip


def _head_sums(a: jax.Array, form: Form) -> jax.Array:
    """f32 [heads of a tile, positions]: sums over the lanes of every head, as a product."""
    shape = (max(form.per_tile, 8), form.tile)
    head, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return select(head == lane // form.size, a, 1, 1)[: form.per_tile]


def _step(
    columns_ref, rows_ref, document_ref, x_ref, b_ref, c_ref, states_ref, dy_ref, g_ref,
    dx_ref, ddt_ref, dtotal_ref, ends_ref, db_ref, dc_ref, ds_ref, *, form,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        ds_ref[...] = g_ref[...]

    dtype = x_ref.dtype
    dot = products(dtype)
    step, _, until, since, total = split(columns_ref[...], form)
    document = jnp.broadcast_to(document_ref[...], (BLOCK, BLOCK))
    j, i = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    seen = (document == document.T) & (i >= j)
    b, c = b_ref[...], c_ref[...]
    scores = jnp.where(seen, dot(b, c, LANES_BOTH), 0.0)
    db = dc = dscores = 0.0

    for first, lanes in form.tiles():
        x, dy, s, ds = x_ref[:, lanes], dy_ref[:, lanes], states_ref[:, lanes], ds_ref[:, lanes]
        wide, dy_low, s_low, ds_low = x.astype(jnp.float32), dy.astype(dtype), s.astype(dtype), ds.astype(dtype)
        dt, to_end = form.spread(step, first), form.spread(until, first)

        # What the state gave to the outputs, and what it got from the positions.
        read = dy * form.spread(since, first)
        dc += dot(read.astype(dtype), s_low, LANES_BOTH)
        above = dot(c, s_low, PLAIN) * read
        dfed = to_end * dot(b, ds_low, PLAIN)
        fed = wide * dt
        db += dot((fed * to_end).astype(dtype), ds_low, LANES_BOTH)
        keep = form.spread(since[BLOCK - 1 :], first)
        kept = keep * jnp.sum(s * ds, axis=0, keepdims=True)
        ends_ref[:, lanes] = kept + jnp.sum(fed * dfed, axis=0, keepdims=True)
        ds_ref[:, lanes] = keep * ds + dot(c, read.astype(dtype), ROWS_BOTH)

        # Pairs within the block.
        sums = []
        for n in range(form.per_tile):
            h, mine = first + n, form.lane_head() == n
            within = jnp.exp(jnp.minimum(rows_ref[h : h + 1, :] - total[:, h : h + 1], 0.0))
            weights = (scores * within).astype(dtype)
            pairs = dot(jnp.where(mine, x, jnp.zeros_like(x)), dy_low, LANES_BOTH) * step[:, h : h + 1]
            dscores += within * pairs
            sums.append(jnp.sum(weights.astype(jnp.float32) * pairs, axis=0, keepdims=True))
            dfed += jnp.where(mine, dot(weights, dy_low, PLAIN), 0.0)
        above = _head_sums(above, form)
        ddt_ref[first : first + form.per_tile, :] = _head_sums(wide * dfed, form)
        for n in range(form.per_tile):
            dtotal_ref[first + n : first + n + 1, :] = sums[n] + above[n : n + 1]
        dx_ref[:, lanes] = (dfed * dt).astype(dx_ref.dtype)

    dscores = jnp.where(seen, dscores, 0.0).astype(dtype)
    db_ref[...] = db + dot(dscores, c, PLAIN)
    dc_ref[...] = dc + dot(dscores, b, ROWS_BOTH)


def ssd_back(
    parts: Parts, s_bhkn: jax.Array, g: tuple[jax.Array, jax.Array], interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Gradients of x, time steps, log decays, B, C and the first state, from those of the outputs of `ref.ssd`."""
    form, t = Form.of(parts), parts[-1].shape[1]
    blocks, s0 = Blocks.of(parts, form), form.state(s_bhkn)
    bs, long = s0.shape[0], blocks.count * BLOCK
    dy = form.in_lanes(jnp.pad(g[0], ((0, 0), (0, long - t), (0, 0), (0, 0))))
    specs = Specs.of(form, blocks.count, reverse=True)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_head, per_group = f32(blocks.rows.shape), f32((bs, form.groups, *blocks.b.shape[1:]))
    dx, ddt, dtotal, ends, db, dc, ds = pl.pallas_call(
        functools.partial(_step, form=form),
        grid=(bs, form.groups, blocks.count),
        in_specs=[*specs.inputs, specs.states, specs.positions, specs.state],
        out_specs=[specs.positions, specs.rows, specs.rows, specs.ends, specs.shared, specs.shared, specs.state],
        out_shape=[
            jax.ShapeDtypeStruct(blocks.x.shape, blocks.x.dtype), per_head, per_head,
            f32((bs, blocks.count, 1, s0.shape[2])), per_group, per_group, f32(s0.shape),
        ],
        compiler_params=SEMANTICS,
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks.x.size * (2 * max(BLOCK, BLOCK * form.tile // form.size) + 5 * s0.shape[1]),
            transcendentals=per_head.size * BLOCK,
            bytes_accessed=2 * blocks.x.nbytes + dy.nbytes + 4 * s0.size * blocks.count + 8 * per_group.size,
        ),
        interpret=interpret,
        name="ssd_chunk_back",
    )(*blocks.inputs(), _states(blocks, s0, form, interpret), dy, form.state(g[1]))  # fmt: skip

    def by_position(a: jax.Array) -> jax.Array:
        return a.reshape(bs, -1, long)[:, : form.h].swapaxes(1, 2)

    ddt, dtotal = by_position(ddt), by_position(dtotal)
    dtotal = (dtotal - blocks.dt * ddt).reshape(bs, blocks.count, BLOCK, form.h)
    ends = form.from_lanes(ends[:, :, 0]).sum(-1)
    dlog = jax.lax.cumsum(dtotal.at[:, :, -1].add(ends), axis=2, reverse=True).reshape(ddt.shape)
    db, dc = (a.sum(1)[:, :t, : form.n].astype(parts[3].dtype) for a in (db, dc))
    return form.from_lanes(dx)[:, :t], ddt[:, :t], dlog[:, :t], db, dc, form.from_state(ds)
