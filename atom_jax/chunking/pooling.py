"""From the positions of a chunk to its vectors, in O(t d).

A pool's state is what it knows of the chunk that is still open, so that a later call can finish it. Unused chunk
slots get zeros, padding and positions outside all chunks change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.segments import (
    gather,
    gather_unique,
    linear_scan,
    scatter_unique,
    segment_max,
    segment_sum,
)
from atom_jax.chunking.types import END, START, Boundary, Plan, Tree
from atom_jax.nn.attention import NEGATIVE, attention_spec
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm, rms_norm
from atom_jax.params import ParamSpec, normal, ones, zeros
from atom_jax.typing import AtomError

EPS = 1e-5


class Pool(NamedTuple):
    """apply(p, h_btd, boundary, plan, state, *, cfg) -> (u_bmkd, state), with k = cfg.slots for pool "attention" and
    1 for the others; spec(cfg, d) -> parameters; init_state(cfg, d, b, dtype) -> the state before the first call."""

    apply: Callable[..., tuple[jax.Array, Tree]]
    spec: Callable[[Chunking, int], Tree]
    init_state: Callable[[Chunking, int, int, Any], Tree]


def check(kind: str, pool: str) -> None:
    """Raises AtomError unless chunks of boundary rules of this kind can be pooled so: where the mark comes first,
    the chunk must be known from its first position; where it comes last, all of it is known."""
    if pool not in POOLS:
        raise AtomError(f"pool: unknown {pool!r}; known: {', '.join(POOLS)}")
    if (kind == START) != (pool == "first"):
        other = "every pool but 'first'" if kind == END else "only pool 'first'"
        raise AtomError(f"pool: {pool!r} does not go with boundary rules of kind {kind!r}, which take {other}")


def _marked(p: Tree, h_btd: jax.Array, boundary: Boundary, plan: Plan, state: Tree, *, cfg: Chunking):
    """The vector at the mark: the first of a chunk (H-Net, arXiv 2507.07955, 2.1) or its last, by the rule's kind."""
    return gather_unique(h_btd, plan.at, _used(plan))[:, :, None], state


def _mean(p: Tree, h_btd: jax.Array, boundary: Boundary, plan: Plan, state: Tree, *, cfg: Chunking):
    """The mean (Dynamic Token Pooling, arXiv 2211.09761, 2.2), with a gradient for `boundary.hard`."""
    sums = segment_sum(_known(h_btd.astype(jnp.float32), plan, 0.0), plan.slot, plan.at.shape[1] + 1)
    sums = _carry(sums, state, plan, jnp.add)
    length = jnp.where(_used(plan), gather(plan.offset, plan.at) + 1, 0)
    n = length.astype(jnp.float32)[:, :, None] + 1e-9
    u_bmd = sums[:, :-1] / n
    if boundary.hard is not None:
        u_bmd = _credit_marks(u_bmd, boundary.hard, h_btd, n, plan)
    return u_bmd.astype(h_btd.dtype)[:, :, None], sums[:, -1]


@jax.custom_vjp
def _credit_marks(u_bmd: jax.Array, hard_bt: jax.Array, h_btd: jax.Array, n_bm1: jax.Array, plan: Plan) -> jax.Array:
    """u_bmd, with the gradient that the means have for the marks.

    A position's membership weight in the published code is 1 + (g - stop_gradient(g)), g the number of marks before
    it, so that a mark moves every later position by <gradient of its chunk, distance from the mean> / n. Within a
    whole chunk these distances add up to nothing: what is left is the rest of the mark's own chunk.
    """
    return u_bmd


def _credit_forward(u_bmd, hard_bt, h_btd, n_bm1, plan):
    return u_bmd, (u_bmd, h_btd, n_bm1, plan)


def _credit_backward(saved, g_bmd):
    u_bmd, h_btd, n_bm1, plan = saved
    slot = jnp.minimum(plan.slot, plan.at.shape[1] - 1)
    away_btd = h_btd.astype(jnp.float32) - gather(u_bmd, slot)
    moved = jnp.where(plan.member, jnp.sum(gather(g_bmd / n_bm1, slot) * away_btd, axis=-1), 0.0)
    same = (plan.member & (plan.slot == jnp.roll(plan.slot, -1, axis=1))).at[:, -1].set(False)
    same = same.astype(jnp.float32)[:, :, None]
    after = linear_scan(same, moved[:, :, None], reverse=True)
    return g_bmd, (same * jnp.roll(after, -1, axis=1))[:, :, 0], None, None, None


_credit_marks.defvjp(_credit_forward, _credit_backward)


def _max(p: Tree, h_btd: jax.Array, boundary: Boundary, plan: Plan, state: Tree, *, cfg: Chunking):
    """The largest value of every feature (Byte Latent Transformer, arXiv 2412.09871, 3.2.1)."""
    top = segment_max(_known(h_btd, plan, -jnp.inf), plan.slot, plan.at.shape[1] + 1)
    top = _carry(top, state, plan, jnp.maximum)
    return jnp.where(_used(plan)[:, :, None], top[:, :-1], 0)[:, :, None], top[:, -1]


def _attention(p: Tree, h_btd: jax.Array, boundary: Boundary, plan: Plan, state: Tree, *, cfg: Chunking):
    """What `slots` learned queries find in the chunk: softmax within it, with running maxima, denominators and
    numerators as in online softmax. In the papers (Learn Your Tokens, arXiv 2310.11628; HAT, 2501.10322) the queries
    are further positions that go through the layers of the encoder; here they look at its result once."""
    m, c = plan.at.shape[1], p["q"].shape[-1]
    x_btd = rms_norm(h_btd, p["norm"], EPS)
    v_btnc = project(x_btd, p["v"]).astype(jnp.float32)
    scores = jnp.einsum("btnc,knc->btnk", project(x_btd, p["k"]).astype(jnp.float32), p["q"].astype(jnp.float32))
    scores = _known(scores * c**-0.5, plan, NEGATIVE)

    top = jnp.maximum(segment_max(jax.lax.stop_gradient(scores), plan.slot, m + 1), NEGATIVE)
    top = _carry(top, state["top"], plan, jnp.maximum)
    weights = _known(jnp.exp(scores - gather(top, plan.slot)), plan, 0.0)
    old = jnp.exp(state["top"] - gather(top, _place(plan)[:, None])[:, 0])
    below = _carry(segment_sum(weights, plan.slot, m + 1), state["below"] * old, plan, jnp.add)
    above = segment_sum(weights[..., None] * v_btnc[:, :, :, None], plan.slot, m + 1)
    above = _carry(above, state["above"] * old[..., None], plan, jnp.add)

    found = above[:, :-1] / jnp.where(below > 0, below, 1.0)[:, :-1, ..., None]
    u_bmkd = project(jnp.swapaxes(found, 2, 3).astype(h_btd.dtype), p["o"], inputs=2)
    return u_bmkd, {"top": top[:, -1], "below": below[:, -1], "above": above[:, -1]}


def _attention_spec(cfg: Chunking, d: int) -> Tree:
    c = head_size(cfg, d)
    projections = attention_spec(d, cfg.heads, cfg.heads, c, "none")
    queries = ParamSpec((cfg.slots, cfg.heads, c), (None, "heads", None), normal(1.0))
    return {**projections, "q": queries, "norm": ParamSpec((d,), (None,), ones)}


def _attention_state(cfg: Chunking, d: int, b: int, dtype: Any) -> Tree:
    shape = (b, cfg.heads, cfg.slots)
    above = jnp.zeros((*shape, head_size(cfg, d)), jnp.float32)
    return {"top": jnp.full(shape, NEGATIVE, jnp.float32), "below": jnp.zeros(shape, jnp.float32), "above": above}


def _concat(p: Tree, h_btd: jax.Array, boundary: Boundary, plan: Plan, state: Tree, *, cfg: Chunking):
    """The chunk's first `max_positions` vectors side by side (zeros where it is shorter), normalised, projected to
    one and normalised again (MegaByte, arXiv 2305.07185, as in IBM's multiscale byte model)."""
    b, _, d = h_btd.shape
    m, width = plan.at.shape[1], cfg.max_positions
    fits = (plan.member | plan.tail) & (plan.offset < width)
    laid = scatter_unique(h_btd, plan.slot * width + plan.offset, fits, (m + 1) * width)
    laid = _carry(laid.reshape(b, m + 1, width * d), state, plan, jnp.add)
    x_bmd = project(layer_norm(laid[:, :-1], p["in_norm"], p["in_bias"], EPS), p["w"])
    x_bmd = x_bmd + jnp.broadcast_to(p["b"].astype(x_bmd.dtype), x_bmd.shape)
    u_bmd = layer_norm(x_bmd, p["out_norm"], p["out_bias"], EPS)
    return jnp.where(_used(plan)[:, :, None], u_bmd, 0)[:, :, None], laid[:, -1]


def _concat_spec(cfg: Chunking, d: int) -> Tree:
    wide = cfg.max_positions * d
    vectors = {"in_norm": (wide, ones), "in_bias": (wide, zeros), "b": (d, zeros)}
    vectors |= {"out_norm": (d, ones), "out_bias": (d, zeros)}
    spec = {name: ParamSpec((size,), (None,), start) for name, (size, start) in vectors.items()}
    return {**spec, "w": ParamSpec((wide, d), ("embed", None), normal(wide**-0.5))}


def head_size(cfg: Chunking, d: int) -> int:
    """Width of one of `cfg.heads` heads. Raises AtomError when d is no multiple of their number."""
    if d % cfg.heads:
        raise AtomError(f"heads: {cfg.heads} heads do not divide the width {d}")
    return d // cfg.heads


def _used(plan: Plan) -> jax.Array:
    """bool [b, m]: the slot holds a chunk made of positions."""
    return (plan.tokens.segments > 0) & ~plan.null


def _known(x: jax.Array, plan: Plan, nothing: float) -> jax.Array:
    """x [b, t, ...] at positions of chunks, finished or still open, and `nothing` elsewhere."""
    inside = (plan.member | plan.tail).reshape(*plan.member.shape, *[1] * (x.ndim - 2))
    return jnp.where(inside, x, nothing)


def _place(plan: Plan) -> jax.Array:
    """i32 [b]: what the chunk left open by earlier calls is here: the first chunk, or (m) open still."""
    return jnp.where(plan.count > 0, 0, plan.at.shape[1])


def _carry(x: jax.Array, state: jax.Array, plan: Plan, join: Callable[..., jax.Array]) -> jax.Array:
    """x [b, m + 1, ...], whose last entry is for the open chunk, joined with state [b, ...] in the chunk that
    continues."""
    entry = jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)
    here = (entry == _place(plan)[:, None]) & plan.continues[:, None]
    here = here.reshape(*here.shape, *[1] * (x.ndim - 2))
    return jnp.where(here, join(x, state[:, None].astype(x.dtype)), x)


def _nothing(cfg: Chunking, d: int) -> Tree:
    return {}


POOLS = {
    "first": Pool(_marked, _nothing, lambda cfg, d, b, dtype: ()),
    "last": Pool(_marked, _nothing, lambda cfg, d, b, dtype: ()),
    "mean": Pool(_mean, _nothing, lambda cfg, d, b, dtype: jnp.zeros((b, d), jnp.float32)),
    "max": Pool(_max, _nothing, lambda cfg, d, b, dtype: jnp.full((b, d), -jnp.inf, dtype)),
    "attention": Pool(_attention, _attention_spec, _attention_state),
    "concat": Pool(_concat, _concat_spec, lambda cfg, d, b, dtype: jnp.zeros((b, cfg.max_positions * d), dtype)),
}
