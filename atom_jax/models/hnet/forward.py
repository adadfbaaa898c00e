"""The forward pass: training, prompts and single bytes are one code path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.chunking import hashing, mixing, pooling, rules, upsampling
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.plan import make_plan
from atom_jax.chunking.rules import predictor
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.types import END, Boundary, Plan, Seen
from atom_jax.kvcache.memory import Memory, each
from atom_jax.models import stack
from atom_jax.models.attention import Context
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.models.hnet.memory import Units, begin
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm
from atom_jax.params import Tree
from atom_jax.sharding import batch_shards, constrain
from atom_jax.typing import Batch, Output


def apply(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """Logits float32 [b, t, v] of every position, with what was learned in `aux` (see `hidden`), and the cache."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    # A function: nothing that a compiled caller could return.
    aux.pop("entropy_loss", None)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def logits(p: Tree, x_btd: jax.Array, *, cfg: HNetConfig) -> jax.Array:
    """Logits float32 [b, t, v] of final states."""
    table = p["unembed"] if "unembed" in p else p["embed"].T
    out = jnp.einsum("btd,dv->btv", x_btd, table.astype(x_btd.dtype), preferred_element_type=jnp.float32)
    if cfg.head_bias:
        out += jnp.broadcast_to(p["unembed_bias"].astype(jnp.float32), out.shape)
    return constrain(out, "batch", None, "vocab")


def hidden(
    p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:
    """Final states [b, t, d], the cache after these bytes, and what was learned.

    key: noise of the boundary rules while training; None = none.
    aux: memory (of every stage, outermost first, what policies of its layers report by name, run by run), where there
    is any; boundaries (bool [b, t] per stage, outermost first, in bytes: where units end or start) and boundary_probs
    (float32 [b, t] per stage; 0 where the stage decides nothing), loss (float32 [], the rules' own), lost (i32 [],
    marks for which there was no slot) and metrics (name -> float32 [2], a sum and what it is to be divided by);
    for predictors supervised by "entropy" also entropy_loss, a function from the entropies float32 [b, t], in nats,
    of the model's next-token distributions to the predictor's loss float32 [], which is to be added to `loss`.
    """
    tokens = Tokens(batch.positions, batch.segments)
    x_btd = embed(p, batch.ids, tokens, None if cache is None else cache.parts.ids, cfg)
    x_btd, memory, notes = _stage(0, x_btd, tokens, cache, Call(cfg, p, batch, key, cache))
    if cache is not None:
        latest = hashing.remember(batch.ids, tokens, cache.parts.ids)
        memory = memory.replace(parts=memory.parts.replace(ids=latest, waiting=cache.parts.waiting))
    aux, late = _aux(notes, batch), _entropy_loss(notes.units, batch, cfg)
    return x_btd, memory, aux if late is None else aux | {"entropy_loss": late}


def embed(p: Tree, ids_bt: jax.Array, tokens: Tokens, before: jax.Array | None, cfg: HNetConfig) -> jax.Array:
    """Embeddings [b, t, d] of bytes and of the n-grams that end at them. before: the latest ids of earlier calls."""
    x_btd = constrain(lookup(p["embed"], ids_bt, cfg.dtype), "batch", None, None)
    return x_btd + _ngrams(p["ngrams"], ids_bt, tokens, before, cfg) if cfg.ngrams else x_btd


def _ngrams(table_nvd: jax.Array, ids_bt: jax.Array, tokens: Tokens, before: jax.Array | None, cfg: HNetConfig):
    """The sum of the embeddings of the n-grams that end at each position: [b, t, d]."""
    rows = [hashing.device(ids_bt, tokens, n, 0, cfg.ngram_rows, before) for n in cfg.ngrams]
    flat = table_nvd.reshape(-1, table_nvd.shape[-1]).astype(cfg.dtype)
    index_btn = jnp.stack([i * cfg.ngram_rows + r for i, r in enumerate(rows)], axis=-1)
    return jnp.sum(jnp.take(flat, index_btn, axis=0), axis=2)


@dataclasses.dataclass
class Call:
    """What all stages of one call share."""

    cfg: HNetConfig
    p: Tree
    batch: Batch
    key: jax.Array | None
    cache: Memory | None

    def context(self, s: int, tokens: Tokens, memory: Memory | None) -> Context:
        """Of the layers of stage s with this memory. Policies draw apart from rules, whose keys have the stages'
        numbers."""
        ids = self.batch.ids if s == 0 else None
        context = Context(tokens, ids=ids, shared=self.p.get("relative"), remat=self.cfg.remat and memory is None)
        if memory is not None:
            return dataclasses.replace(context, length=memory.length, fresh=memory.fresh, reading=memory.reading)
        key = None if self.key is None else jax.random.fold_in(self.key, self.cfg.stages)
        return dataclasses.replace(context, key=key)


@dataclasses.dataclass
class _Note:
    """What one stage decided: its boundary and plan, over the rows of the stage (packed or not)."""

    boundary: Boundary
    plan: Plan


jax.tree_util.register_dataclass(_Note)


class Notes(NamedTuple):
    """Of a stage and all inside it, the outermost first: what was decided about units, and what policies of the
    layers' memories report, by name, of every run of layers that does."""

    units: tuple[_Note, ...] = ()
    memory: tuple[dict[str, tuple], ...] = ()


def _stage(
    s: int, x_btd: jax.Array, tokens: Tokens, memory: Memory | None, call: Call
) -> tuple[jax.Array, Memory | None, Notes]:
    """Stage s and all inside it: [b, t, d] of the stage outside to the same shape."""
    cfg, p = call.cfg, call.p[f"stage{s}"]
    narrow = x_btd.shape[-1]
    if "lift" in p:
        lift = jnp.broadcast_to(p["lift"].astype(x_btd.dtype), (*x_btd.shape[:2], p["lift"].shape[0]))
        x_btd = jnp.concatenate([x_btd, lift], axis=-1)
    real = tokens
    if cfg.official_padding:
        tokens = Tokens(
            jnp.broadcast_to(jnp.arange(x_btd.shape[1])[None], x_btd.shape[:2]), jnp.ones_like(tokens.segments)
        )
    context, units, notes = call.context(s, tokens, memory), Units(), Notes()
    states = (None, None) if memory is None else memory.layers

    def run(name: str, x_btd: jax.Array, i: int) -> tuple[jax.Array, tuple | None, dict[str, tuple]]:
        with jax.named_scope(name if name == "main" else f"{name}{s}"):
            return stack.apply_stack(p[name], cfg.stacks(s)[i], cfg.width(s), x_btd, states[i], context)

    if s == cfg.stages - 1:
        y, *new, said = run("main", x_btd, 0)
    else:
        h, encoder, said = run("encoder", x_btd, 0)
        with jax.named_scope(f"units{s}"):
            h, units, notes = _units(s, h, real, memory, call)
        y, decoder, more = run("decoder", h, 1)
        new = [encoder, decoder]
        said = {name: (*said.get(name, ()), *more.get(name, ())) for name in said | more}
    if memory is not None:
        memory = memory.replace(layers=tuple(new), length=_after(memory, real), parts=units, fresh=False)
    return y[..., :narrow], memory, Notes(notes.units, (said, *notes.memory))


def _after(memory: Memory, tokens: Tokens) -> jax.Array:
    return memory.length + jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)


def _units(
    s: int, h_btd: jax.Array, tokens: Tokens, memory: Memory | None, call: Call
) -> tuple[jax.Array, Units, Notes]:
    """From encoder states to decoder inputs, through the units and the stages inside."""
    cfg, chunking = call.cfg, call.cfg.chunking[s]
    shape, batch = h_btd.shape, call.batch
    ids, marks = (batch.ids, batch.marks) if s == 0 else (None, None)
    if chunking.pack and call.cache is None:
        h_btd, tokens, ids, marks = _pack(h_btd, tokens, ids, marks)
    b, t, _ = h_btd.shape
    units = Units(*begin(cfg, s, b), None) if memory is None else memory.parts
    key = None if call.key is None else jax.random.fold_in(call.key, s)
    boundary, plan, u_bmkd, after = find(s, Seen(h_btd, tokens, ids, marks, key), units, shape[0] // b, call)

    def run(inner: Memory | None) -> tuple[jax.Array, Memory | None, Notes]:
        return inside(s, u_bmkd, boundary, plan, units.newest, inner, call)

    # One position: where no row begins or ends a unit, nothing inside has to run.
    needed = jnp.any(plan.tokens.segments > 0)
    v_bmkd, inner, notes = only_if(needed, run, units.inner) if t == 1 else run(units.inner)
    h_btd, newest = spread(s, v_bmkd, h_btd, boundary, plan, units.newest, call)
    notes = notes._replace(units=(_Note(boundary, plan), *notes.units))
    return h_btd.reshape(shape), after.replace(newest=newest, inner=inner), notes


def find(s: int, seen: Seen, units: Units, documents: int, call: Call) -> tuple[Boundary, Plan, jax.Array, Units]:
    """Where the units of stage s begin or end in this call, their layout, their vectors [b, m, k, d], and the states
    of rule, plan and pool after it. `documents`: at most so many begin in a row of a first call."""
    cfg, p, chunking = call.cfg, call.p[f"stage{s}"], call.cfg.chunking[s]
    boundary, rule = rules.of(chunking.rule).apply(p.get("rule", {}), seen, units.rule, cfg=chunking.rule)
    m = slots_for(seen.h.shape[1], chunking.capacity, 1 if cfg.official_padding else 8)
    if "null" in p and (call.cache is None or call.cache.fresh):
        # Room for the chunk that holds nothing, which every row begins with.
        m += documents
    plan, layout = make_plan(boundary, seen.tokens, m, units.plan, official=cfg.official_padding, null="null" in p)
    pool_units = pooling.POOLS[chunking.pool].apply
    u_bmkd, pool = pool_units(p.get("pool", {}), seen.h, boundary, plan, units.pool, cfg=chunking)
    return boundary, plan, u_bmkd, units.replace(rule=rule, plan=layout, pool=pool)


def only_if(
    needed: jax.Array, run: Callable[[Any], tuple[jax.Array, Any, Notes]], inner: Any
) -> tuple[jax.Array, Any, Notes]:
    """run(inner), which gives (values, the memory after it, notes); or zeros and `inner` where it isn't needed."""
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, inner))

    def skip(inner: Any) -> tuple[jax.Array, Any, Notes]:
        same = None if inner is None else each(lambda node: node.replace(fresh=False), inner)
        return nothing[0], same, nothing[2]

    return jax.lax.cond(needed, run, skip, inner)


def spread(
    s: int, v_bmkd: jax.Array, h_btd: jax.Array, boundary: Boundary, plan: Plan, newest: jax.Array, call: Call
) -> tuple[jax.Array, jax.Array]:
    """Decoder inputs [b, t, d] from the units' outputs, and the newest unit's output after this call."""
    p, chunking = call.p[f"stage{s}"], call.cfg.chunking[s]
    w = upsampling.UPSAMPLERS[chunking.upsample].apply(
        p.get("upsample", {}), v_bmkd.astype(h_btd.dtype), h_btd, plan, newest.astype(h_btd.dtype), cfg=chunking
    )
    return _combine(p, h_btd, w, boundary, chunking), upsampling.carry(v_bmkd, plan, newest)


def inside(
    s: int, u_bmkd: jax.Array, boundary: Boundary, plan: Plan, newest: jax.Array, inner: Memory | None, call: Call
) -> tuple[jax.Array, Memory | None, Notes]:
    """The next stage over the units, and the mixing of what it returns: float32 [b, m, k, d]."""
    p, chunking = call.p[f"stage{s}"], call.cfg.chunking[s]
    b, m, k, d = u_bmkd.shape
    if "null" in p:
        null = jnp.broadcast_to(p["null"].astype(u_bmkd.dtype), u_bmkd.shape)
        u_bmkd = jnp.where(plan.null[..., None, None], null, u_bmkd)
    if "norm" in p:
        u_bmkd = layer_norm(u_bmkd, p["norm"]["w"], p["norm"]["b"], call.cfg.norm_eps)
    u = u_bmkd.reshape(b, m, k * d)
    u = project(u, p["join"]) if "join" in p else u
    tokens = plan.tokens
    if call.cfg.official_padding:
        used = jnp.arange(m)[None] < plan.count[:, None]
        tokens = Tokens(tokens.positions, jnp.where(used, tokens.segments, 0))
    v, inner, notes = _stage(s + 1, u, tokens, inner, call)
    v = project(v, p["part"]) if "part" in p else v
    v = v.astype(jnp.float32)
    if chunking.mix == "ema":
        p_bm = jnp.take_along_axis(boundary.p, plan.at, axis=1)
        segments = plan.tokens.segments
        v = mixing.ema(v, p_bm, segments > 0, segments, newest.reshape(b, k * d))
    return v.reshape(b, m, k, d), inner, notes


def _combine(p: Tree, h_btd: jax.Array, w_btd: jax.Array, boundary: Boundary, chunking: Any) -> jax.Array:
    """What a position read, and what it adds to it."""
    w = w_btd.astype(jnp.float32)
    if chunking.confidence:
        sure = jnp.maximum(boundary.p, 1 - boundary.p)
        w = w * (sure + jax.lax.stop_gradient(1 - sure))[..., None]
    if chunking.residual == "linear":
        r = project(h_btd.astype(jnp.float32), p["residual"]["w"])
        w = w + r + jnp.broadcast_to(p["residual"]["b"].astype(jnp.float32), r.shape)
    elif chunking.residual == "identity":
        w = w + h_btd.astype(jnp.float32)
    return w.astype(h_btd.dtype)


def _pack(h_btd: jax.Array, tokens: Tokens, ids: Any, marks: Any) -> tuple:
    """The rows of every device side by side in one row, as further documents."""
    b, t, _ = h_btd.shape
    rows = batch_shards(b)
    number = jnp.arange(b, dtype=jnp.int32)[:, None] * (t + 1)
    segments = jnp.where(tokens.segments > 0, tokens.segments + number, 0)

    def flat(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else constrain(a.reshape(rows, -1, *a.shape[2:]), "batch", *[None] * (a.ndim - 1))

    return flat(h_btd), Tokens(flat(tokens.positions), flat(segments)), flat(ids), flat(marks)


def _aux(notes: Notes, batch: Batch) -> dict[str, Any]:
    """What the stages decided, in terms of bytes, and what policies report."""
    memory = {"memory": notes.memory} if any(notes.memory) else {}
    return _units_aux(notes.units, batch) | memory if notes.units else memory


def _units_aux(notes: tuple[_Note, ...], batch: Batch) -> dict[str, Any]:
    shape, real = batch.ids.shape, batch.segments > 0
    boundaries, probs, metrics = [], [], {}
    loss, lost, units = jnp.float32(0), jnp.int32(0), jnp.sum(real, dtype=jnp.float32)
    inside: list[_Note] = []
    for s, note in enumerate(notes):
        mark, p = note.boundary.mark, note.boundary.p
        p = mark.astype(jnp.float32) if p is None else p
        for outer in reversed(inside):
            # A unit of an inner stage begins or ends where the chunk that it marks was marked in the stage outside.
            chunk = jnp.minimum(outer.plan.slot, outer.plan.at.shape[1] - 1)
            ours = outer.boundary.mark & outer.plan.member
            take = lambda a, chunk=chunk: jnp.take_along_axis(a.reshape(chunk.shape[0], -1), chunk, axis=1)  # noqa: E731
            # Marks beyond the capacity made no chunk.
            ours &= take(outer.plan.at) == jnp.arange(chunk.shape[1])[None]
            mark, p = take(mark) & ours, jnp.where(ours, take(p), 0.0)
        inside.append(note)
        boundaries.append(mark.reshape(shape) & real)
        probs.append(p.reshape(shape))
        count = jnp.sum(boundaries[-1], dtype=jnp.float32)
        metrics[f"bytes_per_unit_{s}"] = jnp.stack([jnp.sum(real, dtype=jnp.float32), count])
        missed = jnp.sum(note.plan.lost)
        metrics[f"lost_{s}"] = jnp.stack([missed.astype(jnp.float32), jnp.maximum(units, 1.0)])
        units, loss, lost = count, loss + note.boundary.loss, lost + missed
    first = boundaries[0]
    for name, edge in zip(("at_word_edge", "at_character_edge"), _edges(batch.ids, notes[0].boundary.kind)):
        hits = jnp.sum(first & edge, dtype=jnp.float32)
        metrics[name] = jnp.stack([hits, jnp.sum(first, dtype=jnp.float32)])
    return {
        "boundaries": tuple(boundaries),
        "boundary_probs": tuple(probs),
        "loss": loss,
        "lost": lost,
        "metrics": metrics,
    }


def _entropy_loss(notes: tuple[_Note, ...], batch: Batch, cfg: HNetConfig) -> Callable[..., jax.Array] | None:
    rule = cfg.chunking[0].rule if cfg.chunking else None
    if not isinstance(rule, Predictor) or rule.supervision != "entropy":
        return None
    # Rows may have been packed side by side.
    boundary = jax.tree.map(lambda a: a.reshape(batch.ids.shape), notes[0].boundary.replace(loss=None))
    tokens = Tokens(batch.positions, batch.segments)
    return lambda entropy_bt: predictor.entropy_loss(boundary, entropy_bt, tokens, rule)


def _edges(ids_bt: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """bool [b, t]: whether the unit that begins at the mark ("start") or after it ("end") would begin at the edge of
    a word, which is at or after white space, and whether it would begin with a whole UTF-8 character."""
    space = (ids_bt == 0x20) | ((ids_bt >= 0x09) & (ids_bt <= 0x0D))
    inside = (ids_bt >= 0x80) & (ids_bt < 0xC0)
    if kind == END:
        following = lambda a: jnp.roll(a, -1, axis=1)  # noqa: E731
        return space | following(space), ~following(inside)
    return space | jnp.roll(space, 1, axis=1), ~inside
