"""Generation, in which rows wait for each other (`atom_jax.models.quorum`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.chunking import hashing
from atom_jax.chunking.types import Seen
from atom_jax.kvcache.dense import Cache
from atom_jax.models import quorum, stack
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.models.hnet.forward import Call, embed, find, hidden, inside, only_if, spread
from atom_jax.models.hnet.memory import StageState, Waiting
from atom_jax.nn.attention import Tokens
from atom_jax.params import Tree
from atom_jax.typing import Batch


def step(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Cache) -> tuple[jax.Array, Cache, jax.Array]:
    """Reads the next byte of every row; rows whose byte begins or ends a unit of stage 0 wait until enough others do.

    Args:
      batch: [b, 1]. Segment 1 in rows that go on, those that wait included (of these the byte was read before, and
        ids and positions play no part), 0 in rows that don't. Positions are `cache.length`, above 0.
      cache: of an earlier call. While any row waits, it is for this function only.
    Returns: states [b, 1, d], the cache, and ready bool [b]: rows that have been read to the end, and whose states
    are those of `hidden`. Other states are meaningless. Of rows that go on at least one is ready; a single one is.
    """
    live = batch.segments[:, 0] > 0
    if not cfg.chunking:
        x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
        return x_b1d, cache, live
    outer, call, waited = cache.layers[0], Call(cfg, p, batch, None, cache), cache.layers[0].waiting
    tokens = Tokens(batch.positions, jnp.where(waited.on[:, None], 0, batch.segments))
    h_b1d, encoder = _stack("encoder", embed(p, batch.ids, tokens, outer.ids, cfg), outer, tokens, cache.length, call)
    with jax.named_scope("units0"):
        before = (outer.rule, outer.plan, outer.pool)
        boundary, plan, u_b1kd, after = find(0, Seen(h_b1d, tokens, batch.ids), before, 1, call)
        # Only probabilities are needed from here on.
        boundary = boundary.replace(logit=None, hard=None, loss=None)
        waiting = waited.join(Waiting(plan.count > 0, h_b1d, u_b1kd, boundary, plan))
        run = quorum.met(waiting.on, live, enough(p, cfg, cache))
        ready = live & (run | ~waiting.on)
        h_b1d, newest, inner = _units(waiting, waiting.on & ready, run, after[1].chunks, call)
    # The decoder has not seen the bytes of rows that have waited.
    length = cache.length - waited.on
    here = Tokens(length[:, None], ready[:, None].astype(jnp.int32))
    x_b1d, decoder = _stack("decoder", h_b1d, outer, here, length, call)
    latest = hashing.remember(batch.ids, tokens, outer.ids)
    waiting = waiting.replace(on=waiting.on & ~ready)
    outer = StageState((encoder, decoder), *after, newest, latest, waiting)
    return x_b1d, Cache(layers=(outer, *inner), length=cache.length + tokens.segments[:, 0]), ready


def enough(p: Tree, cfg: HNetConfig, cache: Cache) -> int:
    """How many rows should wait, by what is read on both sides (weights and memory) and the share of bytes that there
    is room for."""
    sizes = [
        sum(x.size for x in jax.tree.leaves((p[f"stage{s}"], state.stacks))) for s, state in enumerate(cache.layers)
    ]
    head = cfg.vocab_size * cfg.d_model[0]
    return quorum.size(len(cache.length), cfg.chunking[0].capacity, sizes[0] + head, sum(sizes[1:]))


def _stack(
    name: str, x_b1d: jax.Array, outer: StageState, tokens: Tokens, length: jax.Array, call: Call
) -> tuple[jax.Array, tuple]:
    """The encoder or the decoder of stage 0."""
    p, i, context = call.p["stage0"][name], ("encoder", "decoder").index(name), call.context(tokens, length)
    with jax.named_scope(f"{name}0"):
        return stack.apply_stack(p, call.cfg.layouts(0)[i], call.cfg.width(0), x_b1d, outer.stacks[i], context)


def _units(
    waiting: Waiting, now: jax.Array, run: jax.Array, chunks: jax.Array, call: Call
) -> tuple[jax.Array, jax.Array, tuple]:
    """Decoder inputs, the newest units' outputs and the states inside, after the units of the rows `now` bool [b].
    chunks: i32 [b] units of every row, those that wait included."""
    layers, plan = call.cache.layers, waiting.plan
    newest = layers[0].newest
    units = Tokens(plan.tokens.positions, jnp.where(now[:, None], plan.tokens.segments, 0))
    plan = plan.replace(tokens=units, count=jnp.where(now, plan.count, 0))
    v_b1kd, inner, _ = only_if(
        run,
        lambda inner: inside(0, waiting.u, waiting.boundary, plan, newest, inner, call, chunks - waiting.on),
        layers[1:],
    )
    h_b1d, newest = spread(0, v_b1kd, waiting.h, waiting.boundary, plan, newest, call)
    return h_b1d, newest, inner
