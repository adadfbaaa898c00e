"""The forward pass: the stages of `config.HNetConfig` as parts of the units machine (`atom_jax.units`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import units
from atom_jax.chunking import mixing, rules
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.types import Boundary, Plan, Seen
from atom_jax.kvcache.memory import Memory
from atom_jax.models import stack
from atom_jax.models.attention import Context
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.attention import Tokens
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm
from atom_jax.params import Tree
from atom_jax.typing import Batch, Output
from atom_jax.units import Notes, Place, Stage, waiting


def apply(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """Logits float32 [b, t, v] of every position, with what was learned in `aux` (see `hidden`), and the cache."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def logits(p: Tree, x_btd: jax.Array, *, cfg: HNetConfig) -> jax.Array:
    """Logits float32 [b, t, v] of final states."""
    return ports.of(cfg).outlet(p, x_btd, cfg)


def hidden(
    p: Tree,
    batch: Any,
    *,
    cfg: HNetConfig,
    cache: Memory | None = None,
    key: jax.Array | None = None,
    parts: Callable[[Stage], Stage] = lambda stage: stage,
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:
    """Final states [b, t, d], the cache after these positions, and what was learned (`units.report`; among the
    metrics also those of the port).

    batch: what the port reads, `Batch` or `Frames`. key: noise of the boundary rules while training; None = none.
    parts: what a model puts in place of the parts of the outermost stage.
    """
    tokens, port = Tokens(batch.positions, batch.segments), ports.of(cfg)
    x_btd, latest, changed = port.inlet(p, batch, tokens, None if cache is None else cache.parts.port, cfg)
    seen = Seen(x_btd, tokens, getattr(batch, "ids", None), batch.marks, changed=changed)
    x_btd, cache, notes = _run(0, seen, cache, Call(p, cfg, key, parts))
    if cache is not None:
        cache = cache.replace(parts=cache.parts.replace(port=latest))
    aux = units.report(notes, batch, cfg.chunking)
    if cfg.chunking:
        aux["metrics"] |= port.metrics(aux["boundaries"][0], batch, rules.of(cfg.chunking[0].rule).KIND)
    return x_btd, cache, aux


def step(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next byte of every row; rows whose byte begins or ends a unit of stage 0 wait until enough others do.

    Args:
      batch: [b, 1]. Segment 1 in rows that go on, those that wait included (of these the byte was read before, and
        its id plays no part), 0 in rows that don't.
      cache: of an earlier call. While any row waits, it is for this function only.
    Returns: states [b, 1, d], the cache, and ready bool [b], as `units.step` has them.
    """
    live = batch.segments[:, 0] > 0
    if not cfg.chunking:
        x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
        return x_b1d, cache, live
    tokens = Tokens(cache.length[:, None], waiting.new_rows(cache, live)[:, None].astype(jnp.int32))
    x_b1d, latest, _ = ports.of(cfg).inlet(p, batch, tokens, cache.parts.port, cfg)
    cache = cache.replace(parts=cache.parts.replace(port=latest))
    return units.step(stage(0, Call(p, cfg)), Seen(x_b1d, tokens, batch.ids), cache, live, enough(p, cfg, cache))


def stale(p: Tree, batch: Batch, *, cfg: HNetConfig, cache: Memory) -> tuple[jax.Array, Memory]:
    """Reads the next byte of every row, of which none waits, by the layers of stage 0 alone (`units.stale`): states
    [b, 1, d], and the cache for the next byte, which is for this function only. batch: [b, 1], as for `step`."""
    tokens = Tokens(cache.length[:, None], batch.segments)
    x_b1d, latest, _ = ports.of(cfg).inlet(p, batch, tokens, cache.parts.port, cfg)
    cache = cache.replace(parts=cache.parts.replace(port=latest))
    return units.stale(stage(0, Call(p, cfg)), Seen(x_b1d, tokens, batch.ids), cache)


def together(cfg: HNetConfig) -> HNetConfig | None:
    """See `Family`: with room for a unit of every byte. None where a rule looks ahead."""
    if not cfg.chunking or any(rules.looks_ahead(c.rule) for c in cfg.chunking):
        return None
    return dataclasses.replace(cfg, chunking=tuple(dataclasses.replace(c, capacity=1.0) for c in cfg.chunking))


def enough(p: Tree, cfg: HNetConfig, cache: Memory) -> int:
    """How many rows should wait in `step`."""
    head = p["unembed"] if "unembed" in p else p["embed"]
    inner = [p[f"stage{s}"] for s in range(1, cfg.stages)]
    return waiting.enough((p["stage0"], head), inner, cache, cfg.chunking[0].capacity)


@dataclasses.dataclass(frozen=True)
class Call:
    """What all stages of one call share. key: noise, or None. parts: see `hidden`."""

    p: Tree
    cfg: HNetConfig
    key: jax.Array | None = None
    parts: Callable[[Stage], Stage] = lambda stage: stage


def stage(s: int, call: Call) -> Stage:
    """The parts of stage s, which is not the innermost one."""
    cfg, p, chunking = call.cfg, call.p[f"stage{s}"], call.cfg.chunking[s]

    def encode(x_btd: jax.Array, states: Any, place: Place) -> tuple[jax.Array, Any, dict[str, tuple]]:
        return _stack("encoder", s, _lifted(x_btd, p), states, place, call)

    def inside(
        u_bmkd: jax.Array, boundary: Boundary, plan: Plan, newest_bkd: jax.Array, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None, Notes]:
        b, m, k, d = u_bmkd.shape
        chunks = Seen(*_joined(u_bmkd, plan, p, cfg), plan.ids, deep=True)
        v, memory, notes = _run(s + 1, chunks, memory, call)
        v = (project(v, p["part"]) if "part" in p else v).astype(jnp.float32)
        if chunking.mix == "ema":
            p_bm = jnp.take_along_axis(boundary.p, plan.at, axis=1)
            segments = plan.tokens.segments
            v = mixing.ema(v, p_bm, segments > 0, segments, newest_bkd.reshape(b, k * d))
        return v.reshape(b, m, k, d), memory, notes

    def combine(h_btd: jax.Array, w_btd: jax.Array, boundary: Boundary) -> jax.Array:
        return _combined(p, h_btd, w_btd, boundary, chunking)

    def decode(y_btd: jax.Array, states: Any, place: Place) -> tuple[jax.Array, Any, dict[str, tuple]]:
        y_btd, states, said = _stack("decoder", s, y_btd, states, place, call)
        return _narrow(y_btd, p), states, said

    dtype = jnp.dtype(cfg.dtype)
    return Stage(chunking, p, cfg.d_model[s], dtype, encode, inside, combine, decode, cfg.official_padding)


def _run(s: int, seen: Seen, memory: Memory | None, call: Call) -> tuple[jax.Array, Memory | None, Notes]:
    """Stage s and all inside it: `seen.h` [b, t, d] of the stage outside to the same shape."""
    cfg, p, tokens = call.cfg, call.p[f"stage{s}"], seen.tokens
    if s < cfg.stages - 1:
        key = None if call.key is None else jax.random.fold_in(call.key, s)
        one = stage(s, call)
        return units.run(one if s else call.parts(one), seen.replace(key=key), memory)
    states, place = None if memory is None else memory.layers[0], Place.after(memory, seen)
    with jax.named_scope("main"):
        y_btd, states, said = _stack("main", s, _lifted(seen.h, p), states, place, call)
    if memory is not None:
        length = memory.length + jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)
        memory = memory.replace(layers=(states,), length=length, fresh=False)
    return _narrow(y_btd, p), memory, Notes(memory=(said,))


def _stack(
    name: str, s: int, x_btd: jax.Array, states: Any, place: Place, call: Call
) -> tuple[jax.Array, Any, dict[str, tuple]]:
    """The encoder, the decoder or the main stack of stage s."""
    cfg, tokens = call.cfg, place.tokens
    if cfg.official_padding:
        positions = jnp.broadcast_to(jnp.arange(x_btd.shape[1])[None], x_btd.shape[:2])
        tokens = Tokens(positions, jnp.ones_like(tokens.segments))
    # Policies draw apart from rules, whose keys have the stages' numbers.
    key = None if call.key is None or states is not None else jax.random.fold_in(call.key, cfg.stages)
    context = Context(
        tokens, place.length, place.fresh, place.reading, ids=place.ids, key=key,
        shared=call.p.get("relative"), remat=cfg.remat and states is None,
    )  # fmt: skip
    runs = cfg.stacks(s)[name == "decoder"]
    return stack.apply_stack(call.p[f"stage{s}"][name], runs, cfg.width(s), x_btd, states, context)


def _lifted(x_btd: jax.Array, p: Tree) -> jax.Array:
    """States of the stage outside, with the channels that this one has more."""
    if "lift" not in p:
        return x_btd
    lift = jnp.broadcast_to(p["lift"].astype(x_btd.dtype), (*x_btd.shape[:2], p["lift"].shape[0]))
    return jnp.concatenate([x_btd, lift], axis=-1)


def _narrow(y_btd: jax.Array, p: Tree) -> jax.Array:
    """States without the channels that the stage outside lacks."""
    return y_btd[..., : -p["lift"].shape[0]] if "lift" in p else y_btd


def _joined(u_bmkd: jax.Array, plan: Plan, p: Tree, cfg: HNetConfig) -> tuple[jax.Array, Tokens]:
    """One vector of each unit, [b, m, d] for the next stage, and where the units stand there."""
    if "null" in p:
        null = jnp.broadcast_to(p["null"].astype(u_bmkd.dtype), u_bmkd.shape)
        u_bmkd = jnp.where(plan.null[..., None, None], null, u_bmkd)
    if "norm" in p:
        u_bmkd = layer_norm(u_bmkd, p["norm"]["w"], p["norm"]["b"], cfg.norm_eps)
    b, m, k, d = u_bmkd.shape
    u, tokens = u_bmkd.reshape(b, m, k * d), plan.tokens
    if cfg.official_padding:
        used = jnp.arange(m)[None] < plan.count[:, None]
        tokens = Tokens(tokens.positions, jnp.where(used, tokens.segments, 0))
    return project(u, p["join"]) if "join" in p else u, tokens


def _combined(p: Tree, h_btd: jax.Array, w_btd: jax.Array, boundary: Boundary, chunking: Chunking) -> jax.Array:
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
