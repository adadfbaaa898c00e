"""Generation, in which rows wait for each other (`atom_jax.models.quorum`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.chunking import hashing
from atom_jax.chunking.types import Seen
from atom_jax.kvcache.memory import Memory, nodes
from atom_jax.models import quorum, stack
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.models.hnet.forward import Call, embed, find, hidden, inside, only_if, spread
from atom_jax.models.hnet.memory import Waiting
from atom_jax.nn.attention import Tokens
from atom_jax.params import Tree
from atom_jax.typing import Batch


def step(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
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
    units, call, waited = cache.parts, Call(cfg, p, batch, None, cache), cache.parts.waiting
    tokens = Tokens(batch.positions, jnp.where(waited.on[:, None], 0, batch.segments))
    h_b1d, encoder = _stack(0, embed(p, batch.ids, tokens, units.ids, cfg), tokens, cache, call)
    with jax.named_scope("units0"):
        boundary, plan, u_b1kd, after = find(0, Seen(h_b1d, tokens, batch.ids), units, 1, call)
        # Only probabilities are needed from here on.
        boundary = boundary.replace(logit=None, hard=None, loss=None)
        waiting = waited.join(Waiting(plan.count > 0, h_b1d, u_b1kd, boundary, plan))
        run = quorum.met(waiting.on, live, enough(p, cfg, cache))
        ready = live & (run | ~waiting.on)
        h_b1d, newest, inner = _units(waiting, waiting.on & ready, run, call)
    # The decoder has not seen the bytes of rows that have waited.
    behind = cache.replace(length=cache.length - waited.on)
    here = Tokens(behind.length[:, None], ready[:, None].astype(jnp.int32))
    x_b1d, decoder = _stack(1, h_b1d, here, behind, call)
    latest = hashing.remember(batch.ids, tokens, units.ids)
    waiting = waiting.replace(on=waiting.on & ~ready)
    after = after.replace(newest=newest, inner=inner, ids=latest, waiting=waiting)
    length = cache.length + tokens.segments[:, 0]
    return x_b1d, cache.replace(layers=(encoder, decoder), length=length, parts=after, fresh=False), ready


def enough(p: Tree, cfg: HNetConfig, cache: Memory) -> int:
    """How many rows should wait, by what is read on both sides (weights and memory) and the share of bytes that there
    is room for."""
    sizes = [
        sum(x.size for x in jax.tree.leaves((p[f"stage{s}"], node.layers))) for s, node in enumerate(nodes(cache))
    ]
    head = cfg.vocab_size * cfg.d_model[0]
    return quorum.size(len(cache.length), cfg.chunking[0].capacity, sizes[0] + head, sum(sizes[1:]))


def _stack(i: int, x_b1d: jax.Array, tokens: Tokens, cache: Memory, call: Call) -> tuple[jax.Array, tuple]:
    """The encoder (0) or the decoder (1) of stage 0."""
    name, cfg = ("encoder", "decoder")[i], call.cfg
    runs, context = cfg.stacks(0)[i], call.context(0, tokens, cache)
    with jax.named_scope(f"{name}0"):
        return stack.apply_stack(call.p["stage0"][name], runs, cfg.width(0), x_b1d, cache.layers[i], context)[:2]


def _units(waiting: Waiting, now: jax.Array, run: jax.Array, call: Call) -> tuple[jax.Array, jax.Array, Memory]:
    """Decoder inputs, the newest units' outputs and the memory inside, after the units of the rows `now` bool [b]."""
    units, plan = call.cache.parts, waiting.plan
    places = Tokens(plan.tokens.positions, jnp.where(now[:, None], plan.tokens.segments, 0))
    plan = plan.replace(tokens=places, count=jnp.where(now, plan.count, 0))
    v_b1kd, inner, _ = only_if(
        run,
        lambda inner: inside(0, waiting.u, waiting.boundary, plan, units.newest, inner, call),
        units.inner,
    )
    h_b1d, newest = spread(0, v_b1kd, waiting.h, waiting.boundary, plan, units.newest, call)
    return h_b1d, newest, inner
