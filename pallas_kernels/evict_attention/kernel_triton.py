"""The same attention for NVIDIA GPUs, through Triton; on request only, as it has not run on a GPU yet.

JAX 0.11 deprecates this way to Triton: when it goes, delete this file and what names it in `api`.

Every program has a tile of queries (or of keys, for their gradients) and loops over the tiles that it sees. All tiles
are masked alike; tiles without a key that is kept are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.evict_attention.plan import Plan
from pallas_kernels.evict_attention.ref import NEGATIVE, NOTHING
from pallas_kernels.evict_attention.tiles import LOG2E, Form, Tile, dot


class _Call:
    """The refs of one program, by what they hold. It works for row b and key head h."""

    def __init__(self, refs: tuple, form: Form, b: Any, h: Any, heads: int):
        n, self.form = len(Plan._fields), form
        self.plan, refs = Plan(*refs[:n]), list(refs[n:])
        self.b, self.row = b, b * heads + h
        self.keep = refs.pop(0) if form.keep else None
        self.segments = (refs.pop(0), refs.pop(0)) if form.segments else None
        self.rest = refs

    def penalty(self, i: Any, c: Any, q_axis: int) -> tuple:
        """What is added to the scores of tile (i, c), and where queries are beyond the keep window."""
        blocks = self.form.blocks
        sizes = (blocks.q_tile, blocks.k_tile)
        shape = sizes if q_axis == 0 else sizes[::-1]
        spread = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, 1 - axis), shape)  # noqa: E731
        segments, keep = None, None
        if self.segments is not None:
            x = (self.segments[0][self.q(i)], self.segments[1][self.k(c)])
            segments = spread(x[0], q_axis), spread(x[1], 1 - q_axis)
        if self.keep is not None:
            keep = spread(self.keep[self.k(c)], 1 - q_axis)
        tile = Tile(self.plan.start[self.b] + i * blocks.q_tile, c * blocks.k_tile, self.form)
        return tile.penalty(shape, q_axis, segments, keep)

    def gone(self, i: Any, c: Any) -> Any:
        """Whether all keys of tile c are evicted for all queries of tile i."""
        if self.keep is None:
            return False
        low = self.plan.start[self.b] + i * self.form.blocks.q_tile
        far = low - jnp.minimum((c + 1) * self.form.blocks.k_tile, self.form.s) >= self.form.keep_window
        return far & (self.plan.gone[self.row, c] == 1)

    def q(self, i: Any) -> Any:
        return pl.ds(i * self.form.blocks.q_tile, self.form.blocks.q_tile)

    def k(self, c: Any) -> Any:
        return pl.ds(c * self.form.blocks.k_tile, self.form.blocks.k_tile)

    def loop(self, low: Any, high: Any, step: Any, start: tuple, at: Any) -> tuple:
        """step(n, carry) for n in [low, high), except where all keys of the tile at(n) are gone."""

        def unless_gone(n: Any, carry: tuple) -> tuple:
            return step(n, carry) if self.keep is None else jax.lax.cond(
                self.gone(*at(n)), lambda x: x, lambda x: step(n, x), carry
            )  # fmt: skip

        return jax.lax.fori_loop(low, high, unless_gone, start)


def _forward(*refs: Any, form: Form, g: int) -> None:
    i, head, b = (pl.program_id(n) for n in range(3))
    call = _Call(refs, form, b, head // g, pl.num_programs(1) // g)
    q_ref, k_ref, v_ref, out_ref, lse_ref = call.rest
    q = q_ref[...]

    def step(c: Any, carry: tuple) -> tuple:
        out, before, total = carry
        scores = dot(q, k_ref[call.k(c), :], (1, 1)) + call.penalty(i, c, 0)[0]
        top = jnp.maximum(before, scores.max(1))
        weights, shrink = jnp.exp2(scores - top[:, None]), jnp.exp2(before - top)
        v = v_ref[call.k(c), :]
        return out * shrink[:, None] + dot(weights.astype(v.dtype), v, (1, 0)), top, total * shrink + weights.sum(1)

    zero = jnp.zeros(q.shape[0], jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), zero + NOTHING, zero)
    span = call.plan.first[b, i], call.plan.end[b, i]
    out, top, total = call.loop(*span, step, start, lambda c: (i, c))
    safe = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (out / safe[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, top / LOG2E + jnp.log(safe), NEGATIVE)


def _back_q(*refs: Any, form: Form, g: int) -> None:
    i, head, b = (pl.program_id(n) for n in range(3))
    call = _Call(refs, form, b, head // g, pl.num_programs(1) // g)
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref = call.rest
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]

    def step(c: Any, d_q: Any) -> Any:
        k = k_ref[call.k(c), :]
        weights = jnp.exp2(dot(q, k, (1, 1)) + call.penalty(i, c, 0)[0] - lse[:, None])
        d_scores = weights * (dot(d_out, v_ref[call.k(c), :], (1, 1)) - delta[:, None])
        return d_q + dot(d_scores.astype(k.dtype), k, (1, 0))

    span = call.plan.first[b, i], call.plan.end[b, i]
    d_q_ref[...] = call.loop(*span, step, jnp.zeros(q.shape, jnp.float32), lambda c: (i, c))


def _back_k(*refs: Any, form: Form, g: int) -> None:
    c, h, b = (pl.program_id(n) for n in range(3))
    call = _Call(refs, form, b, h, pl.num_programs(1))
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, *d_keep_ref = call.rest
    k, v = k_ref[...], v_ref[...]
    first = call.plan.q_first[call.row, c]
    count = jnp.maximum(call.plan.q_end[call.row, c] - first, 0)

    def tile(n: Any) -> tuple:
        return first + n % jnp.maximum(count, 1), c

    def step(n: Any, carry: tuple) -> tuple:
        d_k, d_v, d_keep = carry
        head, i = n // jnp.maximum(count, 1), tile(n)[0]
        q, d_out = q_ref[head, call.q(i), :], d_out_ref[head, call.q(i), :]
        penalty, far = call.penalty(i, c, 1)
        weights = jnp.exp2(dot(k, q, (1, 1)) + penalty - lse_ref[head, call.q(i)][None])
        d_v += dot(weights.astype(v.dtype), d_out, (1, 0))
        d_scores = weights * (dot(v, d_out, (1, 1)) - delta_ref[head, call.q(i)][None])
        if far is not None:
            d_keep += jnp.where(far, d_scores, 0.0).sum(1)
        return d_k + dot(d_scores.astype(q.dtype), q, (1, 0)), d_v, d_keep

    zero = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v, d_keep = call.loop(0, g * count, step, (zero, zero, jnp.zeros(k.shape[0], jnp.float32)), tile)
    d_k_ref[...] = (d_k / LOG2E).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
    if d_keep_ref:
        d_keep_ref[0][...] = d_keep


def _run(
    body: Any, grid: tuple, arrays: list, outputs: list, keep: Any, segments: Any, plan: Plan, form: Form
) -> Any:
    """pallas_call with `arrays` and `outputs` as (array or shape, kind).

    Kinds: "q" and "k", the program's tile of queries or keys; "all_q" and "all_k", all of its key head."""
    g = arrays[0][0].shape[2]
    # Program heads per key head: g where programs have a tile of queries, 1 where they have one of keys.
    share = grid[1] // arrays[1][0].shape[1]
    q_tile, k_tile = form.blocks.q_tile, form.blocks.k_tile

    def spec(x: Any, kind: str) -> pl.BlockSpec:
        tail = (0,) * (len(x.shape) - (4 if kind == "q" else 3))
        if kind == "q":
            return pl.BlockSpec(
                (None, None, None, q_tile, *x.shape[4:]), lambda i, h, b: (b, h // g, h % g, i, *tail)
            )
        if kind == "k":
            return pl.BlockSpec((None, None, k_tile, *x.shape[3:]), lambda i, h, b: (b, h, i, *tail))
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, b: (b, h // share, *(0,) * (len(x.shape) - 2)))

    inputs, specs = list(plan), [pl.BlockSpec(x.shape, lambda *_, n=x.ndim: (0,) * n) for x in plan]
    if form.keep:
        inputs.append(keep[:, :, 0])
        specs.append(spec(inputs[-1], "all_k"))
    if form.segments:
        inputs += [x[:, 0] for x in segments]
        specs += [pl.BlockSpec((None, x.shape[2]), lambda i, h, b: (b, 0)) for x in segments]
    return pl.pallas_call(
        functools.partial(body, form=form, g=g),
        grid=grid,
        in_specs=[*specs, *(spec(*x) for x in arrays)],
        out_specs=[spec(*x) for x in outputs],
        out_shape=[x for x, _ in outputs],
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        interpret=form.interpret,
        name=f"evict_attention{body.__name__}",
    )(*inputs, *(x for x, _ in arrays))


def forward(q, k, v, keep, segments, plan: Plan, form: Form) -> tuple[jax.Array, jax.Array]:
    """As `kernel.forward`."""
    b, h, g, t, _ = q.shape
    outputs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), "q"), (jax.ShapeDtypeStruct(q.shape[:4], jnp.float32), "q")]
    arrays = [(q, "q"), (k, "all_k"), (v, "all_k")]
    return _run(_forward, (t // form.blocks.q_tile, h * g, b), arrays, outputs, keep, segments, plan, form)


def backward(q, k, v, d_out, lse, delta, keep, segments, plan: Plan, form: Form) -> tuple[jax.Array, ...]:
    """As `kernel_bwd.backward`."""
    b, h, g, t, _ = q.shape
    rest = (keep, segments, plan, form)
    queries = [q, d_out, lse, delta]
    arrays = [(x, "q") for x in queries]
    arrays[1:1] = [(k, "all_k"), (v, "all_k")]
    d_q = [(jax.ShapeDtypeStruct(q.shape, jnp.float32), "q")]
    d_q = _run(_back_q, (t // form.blocks.q_tile, h * g, b), arrays, d_q, *rest)[0]
    arrays = [(x, "all_q") for x in queries]
    arrays[1:1] = [(k, "k"), (v, "k")]
    outputs = [(jax.ShapeDtypeStruct(x.shape, x.dtype), "k") for x in (k, v)]
    if form.keep:
        outputs.append((jax.ShapeDtypeStruct(k.shape[:3], jnp.float32), "k"))
    d_k, d_v, *d_keep = _run(_back_k, (k.shape[2] // form.blocks.k_tile, h, b), arrays, outputs, *rest)
    return d_q, d_k, d_v, *(x[:, :, None] for x in d_keep)
