"""Generation, in which rows wait for each other (`quorum`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.chunking import rules
from atom_jax.chunking.types import Boundary, Seen
from atom_jax.kvcache.memory import Memory
from atom_jax.nn.attention import Tokens
from atom_jax.units import quorum
from atom_jax.units.memory import Latest, Parts
from atom_jax.units.stage import Place, Stage, find, only_if, spread


def new_rows(memory: Memory, live_b: jax.Array) -> jax.Array:
    """bool [b]: the live rows whose position `step` is to give to the encoder; the others have been there."""
    return live_b & (memory.parts.latest.behind == 0)


def step(
    stage: Stage, seen: Seen, memory: Memory, live_b: jax.Array, least: int, ends_b: jax.Array | None = None
) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next position of every row; rows whose position begins or ends a unit wait until enough others do.

    Args:
      seen: [b, 1], `h` the inputs of the encoder, segment 1 in `new_rows`, 0 in all others, whose ids play no part.
      memory: of an earlier call. While any row waits, it is for this function only.
      live_b: bool [b], rows that go on, those that wait included. least: how many of them should wait.
      ends_b: bool [b], marks of rows that go on, for rules that look ahead.
    Returns: states [b, 1, d], the memory, and ready bool [b]: rows that have been read to the end, and whose states
    are those of `run`. Other states are meaningless. Of rows that go on at least one is ready; a single one is.
    """
    (encoder, decoder), parts, latest = memory.layers, memory.parts, memory.parts.latest
    behind, tokens = latest.behind, seen.tokens
    with jax.named_scope("encoder"):
        h_b1d, encoder, _ = stage.encode(seen.h, encoder, Place.after(memory, seen))
    with jax.named_scope("units"):
        boundary, parts, seen = _decide(stage, seen.replace(h=h_b1d), memory, live_b, ends_b)
        plan, u_b1kd, parts = find(stage, seen, boundary, parts)
        waiting = _join(latest, Latest(plan.count > 0, seen.h, u_b1kd, boundary, plan))
        run = quorum.met(waiting.on, live_b, least)
        ready = live_b & (run | ~waiting.on)
        y_b1d, parts = _units(stage, waiting, waiting.on & ready, run, parts)
    # The decoder has not seen the positions of rows that have waited.
    here = Tokens((memory.length - behind)[:, None], ready[:, None].astype(jnp.int32))
    seen = seen.replace(tokens=here, ids=jnp.where(waiting.on[:, None], waiting.plan.ids, seen.ids))
    with jax.named_scope("decoder"):
        x_b1d, decoder, _ = stage.decode(y_b1d, decoder, Place.after(memory, seen, behind))
    waiting = waiting.replace(on=waiting.on & ~ready)
    if latest.undecided is not None:
        x = jnp.where(ready[:, None, None], x_b1d, latest.x)
        waiting = waiting.replace(undecided=latest.undecided & ~live_b, ids=seen.ids, x=x)
    memory = memory.replace(
        layers=(encoder, decoder), length=memory.length + tokens.segments[:, 0],
        parts=parts.replace(latest=waiting), fresh=False,
    )  # fmt: skip
    return x_b1d, memory, ready


def waits(memory: Memory) -> jax.Array:
    """bool [b]: rows that wait in `step`; none in models without units."""
    latest = getattr(memory.parts, "latest", None)
    return jnp.zeros(memory.length.shape, bool) if latest is None else latest.behind > 0


def stale(stage: Stage, seen: Seen, memory: Memory) -> tuple[jax.Array, Memory]:
    """Reads the next position of every row as if it neither began nor ended a unit: nothing inside runs.

    seen: as for `step`. memory: of rows that don't wait; it may lack what is inside (`without_inside`). Returns:
    states [b, 1, d], those of `step` up to the first position that begins or ends a unit; and the memory for the next
    position, which is for this function only.
    """
    (encoder, decoder), parts, place = memory.layers, memory.parts, Place.after(memory, seen)
    h_b1d, encoder, _ = stage.encode(seen.h, encoder, place)
    boundary, parts, seen = _decide(stage, seen.replace(h=h_b1d), memory, seen.tokens.segments[:, 0] > 0, None)
    boundary = boundary.replace(mark=jnp.zeros_like(boundary.mark))
    plan, u_b1kd, parts = find(stage, seen, boundary, parts)
    nothing = jnp.zeros(u_b1kd.shape, jnp.float32)
    y_b1d, _ = spread(stage, nothing, seen.h, boundary, plan, parts.newest)
    x_b1d, decoder, _ = stage.decode(y_b1d, decoder, place)
    length = memory.length + seen.tokens.segments[:, 0]
    return x_b1d, memory.replace(layers=(encoder, decoder), length=length, parts=parts, fresh=False)


def without_inside(memory: Memory) -> Memory:
    """The memory as `stale` needs it."""
    return memory.replace(parts=memory.parts.replace(inside=None), fresh=False)


def enough(outer: Any, inner: Any, memory: Memory, capacity: float) -> int:
    """How many rows should wait, by what is read on both sides (weights, as trees, and memory) and the share of
    positions that there is room for."""
    outer, inner = (
        sum(x.size for x in jax.tree.leaves(side)) for side in ((outer, memory.layers), (inner, memory.parts.inside))
    )
    return quorum.size(len(memory.length), capacity, outer, inner)


def _decide(
    stage: Stage, seen: Seen, memory: Memory, live_b: jax.Array, ends_b: jax.Array | None
) -> tuple[Boundary, Parts, Seen]:
    """The marks of positions that are decided in this step, and these positions."""
    cfg, parts = stage.chunking.rule, memory.parts
    rule, latest = rules.of(cfg), parts.latest
    if latest.undecided is None:
        boundary, state = rules.apply(stage.p.get("rule", {}), seen, parts.rule, cfg=cfg, foresee=stage.foresee)
        # Only probabilities are needed from here on.
        return boundary.replace(logit=None, hard=None, loss=None), parts.replace(rule=state), seen
    new, here = seen.tokens.segments > 0, (live_b & ~latest.on)[:, None]
    h_b1d, ids = jnp.where(new[..., None], seen.h, latest.h), jnp.where(new, seen.ids, latest.ids)
    positions = (memory.length - latest.behind)[:, None]
    mark = here & ends_b[:, None]
    boundary = Boundary(mark, mark.astype(jnp.float32), loss=None, kind=rule.KIND)
    return boundary, parts, Seen(h_b1d, Tokens(positions, here.astype(jnp.int32)), ids)


def _join(old: Latest, new: Latest) -> Latest:
    """`old` in rows that wait, `new` in the others."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(old.on.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, old.replace(undecided=None, ids=None, x=None), new)


def _units(stage: Stage, waiting: Latest, now: jax.Array, run: jax.Array, parts: Parts) -> tuple[jax.Array, Parts]:
    """Decoder inputs [b, 1, d], and `parts` after the units of the rows `now` bool [b]."""
    plan, newest = waiting.plan, parts.newest
    units = Tokens(plan.tokens.positions, jnp.where(now[:, None], plan.tokens.segments, 0))
    plan = plan.replace(tokens=units, count=jnp.where(now, plan.count, 0))

    def inside(memory: Memory) -> tuple[jax.Array, Memory, Any]:
        return stage.inside(waiting.u, waiting.boundary, plan, newest, memory)

    v_b1kd, memory, _ = only_if(run, inside, parts.inside)
    y_b1d, newest = spread(stage, v_b1kd, waiting.h, waiting.boundary, plan, newest)
    return y_b1d, parts.replace(newest=newest, inside=memory)
