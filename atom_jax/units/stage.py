"""One stage over t positions: encoder, units, decoder. Training, prompts and later turns are this one code path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.chunking import pooling, rules, upsampling
from atom_jax.chunking.config import Chunking, slots_for
from atom_jax.chunking.plan import make_plan
from atom_jax.chunking.segments import gather
from atom_jax.chunking.types import Boundary, Plan, Seen, last_real
from atom_jax.kvcache.memory import Memory, each
from atom_jax.nn.attention import Tokens
from atom_jax.params import Tree
from atom_jax.sharding import batch_shards, constrain
from atom_jax.units.memory import Latest, Parts


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the positions of a call stand: tokens; their ids, as `Seen` has them; and length (None without a
    memory), fresh and reading of the memory that they go to."""

    tokens: Tokens
    ids: jax.Array | None = None
    length: jax.Array | None = None
    fresh: bool = False
    reading: int = 0

    @classmethod
    def after(cls, memory: Memory | None, seen: Seen, behind: jax.Array | int = 0) -> Place:
        """Positions after what a memory holds, but for the latest `behind` i32 [b] of every row."""
        if memory is None:
            return cls(seen.tokens, seen.ids)
        return cls(seen.tokens, seen.ids, memory.length - behind, memory.fresh, memory.reading)


@dataclasses.dataclass(frozen=True)
class Note:
    """What a stage decided: its boundary and plan, over the rows of the stage (packed or not)."""

    boundary: Boundary
    plan: Plan


jax.tree_util.register_dataclass(Note)


class Notes(NamedTuple):
    """Of a stage and all inside it, the outermost first: what was decided about units, and what policies of the
    layers' memories report, by name, of every run of layers that does."""

    units: tuple[Note, ...] = ()
    memory: tuple[dict[str, tuple], ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """The parts of a stage, as a model supplies them.

    chunking: how units are found, pooled and spread. p: the parameters of that ("rule", "pool", "upsample"); with
    "null" in it, every document begins with a unit that holds nothing (the chunk's own vector is the model's).
    d: width of states, dtype: of what they are pooled to. official: as `make_plan` has it. foresee: for rules that
        compare what a position holds with what could be foretold of it (`chunking.rules`).

    encode, decode: (x [b, t, ...], layers of the memory or None, Place) -> (states [b, t, d], these layers, and what
        they report, as `Notes.memory` has it).
    inside: (units [b, m, k, d], Boundary, Plan, newest unit [b, k, d], memory or None) -> (units as they come back
        [b, m, k, d], memory, `Notes`).
    combine: (encoder states [b, t, d], what the positions read [b, t, d], Boundary) -> decoder inputs [b, t, e].
    """

    chunking: Chunking
    p: Tree
    d: int
    dtype: Any
    encode: Callable[..., tuple[jax.Array, Any, dict[str, tuple]]]
    inside: Callable[..., tuple[jax.Array, Memory | None, Notes]]
    combine: Callable[[jax.Array, jax.Array, Boundary], jax.Array]
    decode: Callable[..., tuple[jax.Array, Any, dict[str, tuple]]]
    official: bool = False
    foresee: Callable[[jax.Array], jax.Array] | None = None


def run(
    stage: Stage, seen: Seen, memory: Memory | None = None, ends_bt: jax.Array | None = None
) -> tuple[jax.Array, Memory | None, Notes]:
    """States [b, t, d] of all positions, the memory after them, and what the stages decided, outermost first.

    With a memory, a rule that looks ahead leaves the last position of every row undecided. Only the encoder has seen
    it then, and a later call goes on with it (or `step`, which is told). The states are those of the positions before
    the ones given: of the undecided one or of the latest, and of all given ones but the last.

    Args:
      seen: `h` are the inputs of the encoder. Its tokens follow those in the memory, whose rows all have been read to
        the end (`step`); padding comes last then.
      ends_bt: bool [b, t], marks in place of those that the rule finds; None: the rule's own.
    """
    given, place = seen, Place.after(memory, seen)
    encoder, decoder, parts = (None, None, None) if memory is None else (*memory.layers, memory.parts)
    with jax.named_scope("encoder"):
        h_btd, encoder, said = stage.encode(seen.h, encoder, place)
    seen = seen.replace(h=h_btd)
    with jax.named_scope("units"):
        if parts is None:
            seen = _pack(seen) if stage.chunking.pack else seen
            parts = Parts.empty(stage.chunking, stage.d, seen.h.shape[0], stage.dtype)
        boundary, parts, seen = _decide(stage, seen, parts, place, ends_bt)
        y_btd, parts, notes = _units(stage, seen, boundary, parts, place, len(h_btd))
    ahead = None if memory is None or not rules.looks_ahead(stage.chunking.rule) else memory.parts.latest
    if ahead is not None:
        place = Place.after(memory, seen, ahead.behind)
    with jax.named_scope("decoder"):
        x_btd, decoder, more = stage.decode(y_btd.reshape(*h_btd.shape[:2], -1), decoder, place)
    said = {name: (*said.get(name, ()), *more.get(name, ())) for name in said | more}
    notes = notes._replace(memory=(said, *notes.memory))
    if memory is None:
        return x_btd, None, notes
    if ahead is not None:
        x_btd, latest = _behind(x_btd, given.replace(h=h_btd), place, ahead)
        parts = parts.replace(latest=latest)
    length = memory.length + jnp.sum(given.tokens.segments > 0, axis=1, dtype=jnp.int32)
    return x_btd, memory.replace(layers=(encoder, decoder), length=length, parts=parts, fresh=False), notes


def _decide(
    stage: Stage, seen: Seen, parts: Parts, place: Place, ends_bt: jax.Array | None
) -> tuple[Boundary, Parts, Seen]:
    """The marks of the positions that are decided in this call, and these positions: all, or, where the rule looks
    ahead, those from the undecided one of earlier calls to the last but one."""
    cfg = stage.chunking.rule
    ahead = place.length is not None and rules.looks_ahead(cfg)
    if ahead and not place.fresh:
        seen = _after(parts.latest, seen, place)
    boundary, state = rules.apply(stage.p.get("rule", {}), seen, parts.rule, cfg=cfg, foresee=stage.foresee)
    if ends_bt is not None:
        extra = seen.h.shape[1] - ends_bt.shape[1]
        ends_bt = jnp.pad(ends_bt, ((0, 0), (extra, 0)))
        boundary = boundary.replace(mark=ends_bt & (seen.tokens.segments > 0))
    if ahead:
        count = jnp.sum(seen.tokens.segments > 0, axis=1, keepdims=True) - 1
        if not place.fresh:
            undecided = parts.latest.undecided
            pick = lambda a: a if a.ndim < 2 else _where(undecided, a[:, :-1], a[:, 1:])  # noqa: E731
            seen, boundary = jax.tree.map(pick, (seen, boundary))
        known = jnp.arange(seen.h.shape[1], dtype=jnp.int32)[None] < count
        segments = jnp.where(known, seen.tokens.segments, 0)
        seen = seen.replace(tokens=seen.tokens.replace(segments=segments))
        boundary = boundary.replace(mark=boundary.mark & known)
    return boundary, parts.replace(rule=state), seen


def _after(latest: Latest, seen: Seen, place: Place) -> Seen:
    """The positions given, [b, t + 1] with the undecided one (or padding) in front."""
    tokens = Tokens(
        jnp.concatenate([place.length[:, None] - 1, seen.tokens.positions], axis=1),
        jnp.concatenate([latest.undecided[:, None].astype(jnp.int32), seen.tokens.segments], axis=1),
    )
    h_btd, ids = (jnp.concatenate(pair, axis=1) for pair in ((latest.h, seen.h), (latest.ids, seen.ids)))
    return Seen(h_btd, tokens, ids)


def _behind(x_btd: jax.Array, given: Seen, place: Place, latest: Latest) -> tuple[jax.Array, Latest]:
    """States of the positions before the given ones, from those of the ones that were decided (`place`), and what is
    kept of the latest."""
    before_btd, tokens = jnp.concatenate([latest.x, x_btd[:, :-1]], axis=1), given.tokens
    after = latest.replace(
        h=last_real(given.h, tokens, latest.h[:, 0])[:, None],
        ids=last_real(given.ids, tokens, latest.ids[:, 0])[:, None],
        undecided=latest.undecided | jnp.any(tokens.segments > 0, axis=1),
        x=last_real(x_btd, place.tokens, latest.x[:, 0])[:, None],
    )
    return before_btd if place.fresh else _where(latest.undecided, x_btd, before_btd), after


def _where(rows_b: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(rows_b.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _units(
    stage: Stage, seen: Seen, boundary: Boundary, parts: Parts, place: Place, rows: int
) -> tuple[jax.Array, Parts, Notes]:
    """From encoder states to decoder inputs, through the units and what is inside. rows: of the call, which may lie
    side by side here."""
    # Room for the unit that holds nothing, which every document begins with.
    begin = rows // seen.h.shape[0] if place.length is None or place.fresh else 0
    plan, u_bmkd, parts = find(stage, seen, boundary, parts, begin)

    def inside(memory: Memory | None) -> tuple[jax.Array, Memory | None, Notes]:
        return stage.inside(u_bmkd, boundary, plan, parts.newest, memory)

    # One position: where no row begins or ends a unit, nothing inside has to run.
    if seen.h.shape[1] == 1:
        v_bmkd, memory, notes = only_if(jnp.any(plan.tokens.segments > 0), inside, parts.inside)
    else:
        v_bmkd, memory, notes = inside(parts.inside)
    y_btd, newest = spread(stage, v_bmkd, seen.h, boundary, plan, parts.newest)
    notes = notes._replace(units=(Note(boundary, plan), *notes.units))
    return y_btd, parts.replace(newest=newest, inside=memory), notes


def find(
    stage: Stage, seen: Seen, boundary: Boundary, parts: Parts, documents: int = 0
) -> tuple[Plan, jax.Array, Parts]:
    """The layout of the units that begin or end in this call, their vectors [b, m, k, d], and `parts` after it.
    documents: at most so many begin in a row."""
    chunking, null = stage.chunking, "null" in stage.p
    m = slots_for(seen.h.shape[1], chunking.capacity, 1 if stage.official else 8) + null * documents
    plan, layout = make_plan(boundary, seen.tokens, m, parts.plan, official=stage.official, null=null)
    if parts.inside is not None:
        # Behind all that is inside, which is more than the document's own units on top of a lasting memory.
        places_bm = plan.tokens.positions + (parts.inside.length - parts.plan.chunks)[:, None]
        plan = plan.replace(tokens=plan.tokens.replace(positions=places_bm))
    if seen.ids is not None:
        plan = plan.replace(ids=jnp.where(plan.null, -1, gather(seen.ids, plan.at)))
    pool, p = pooling.POOLS[chunking.pool], stage.p.get("pool", {})
    u_bmkd, state = pool.apply(p, seen.h, boundary, plan, parts.pool, cfg=chunking)
    return plan, u_bmkd, parts.replace(plan=layout, pool=state)


def only_if(
    needed: jax.Array, run: Callable[..., tuple[jax.Array, Any, Notes]], memory: Memory | None
) -> tuple[jax.Array, Memory | None, Notes]:
    """run(memory), which gives (values, the memory after it, notes); or zeros and `memory` where it isn't needed."""
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, memory))

    def skip(memory: Memory | None) -> tuple[jax.Array, Memory | None, Notes]:
        same = None if memory is None else each(lambda node: node.replace(fresh=False), memory)
        return nothing[0], same, nothing[2]

    return jax.lax.cond(needed, run, skip, memory)


def spread(
    stage: Stage, v_bmkd: jax.Array, h_btd: jax.Array, boundary: Boundary, plan: Plan, newest_bkd: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decoder inputs [b, t, d] from the units as they came back, and the newest one after this call."""
    chunking, p = stage.chunking, stage.p.get("upsample", {})
    w_btd = upsampling.UPSAMPLERS[chunking.upsample].apply(
        p, v_bmkd.astype(h_btd.dtype), h_btd, plan, newest_bkd.astype(h_btd.dtype), cfg=chunking
    )
    newest_bkd = upsampling.carry(v_bmkd, plan, newest_bkd).astype(newest_bkd.dtype)
    return stage.combine(h_btd, w_btd, boundary), newest_bkd


def _pack(seen: Seen) -> Seen:
    """The rows of every device side by side in one row, as further documents."""
    b, t, _ = seen.h.shape
    rows = batch_shards(b)
    number = jnp.arange(b, dtype=jnp.int32)[:, None] * (t + 1)
    segments = jnp.where(seen.tokens.segments > 0, seen.tokens.segments + number, 0)

    def flat(a: jax.Array) -> jax.Array:
        return constrain(a.reshape(rows, -1, *a.shape[2:]), "batch", *[None] * (a.ndim - 1))

    packed = jax.tree.map(flat, seen.replace(tokens=Tokens(seen.tokens.positions, segments), key=None))
    return packed.replace(key=seen.key)
