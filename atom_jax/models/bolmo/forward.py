"""The forward pass over whole texts, for training, scoring and prompts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import units
from atom_jax.chunking.types import Boundary, Plan, Seen
from atom_jax.kvcache.memory import Memory
from atom_jax.models import layers, transformer
from atom_jax.models.bolmo.config import FUSED, BolmoConfig
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.nn.linear import project
from atom_jax.nn.mlp import swiglu
from atom_jax.nn.mlstm import mlstm
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree
from atom_jax.sharding import constrain
from atom_jax.tokenizers.suffix import advance
from atom_jax.typing import AtomError, Batch, Output, Suffix
from atom_jax.units import Notes, Place, Stage, waiting


def apply(p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """Logits float32 [b, t, 520] of every position, with what was learned in `aux` (see `hidden`), and the cache."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def logits(p: Tree, x_btd: jax.Array, *, cfg: BolmoConfig) -> jax.Array:
    """Logits float32 [b, t, 520] of final states."""
    out = jnp.einsum("btd,dv->btv", x_btd, p["unembed"].astype(x_btd.dtype), preferred_element_type=jnp.float32)
    return constrain(out, "batch", None, "vocab")


def hidden(
    p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Memory | None = None, key: jax.Array | None = None,
    ends: jax.Array | None = None,
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:  # fmt: skip
    """Final normalised states [b, t, d], the cache after these bytes, and what was learned.

    Ids at the ends of patches count as what they are without them: where patches end the boundary predictor says,
    which sees the next byte too, or `ends` bool [b, t].

    Args:
      batch: where the model has a table of subwords, with `suffix`, or p with the automaton's tables as "suffix".
        Its `marks` are what the predictor is to learn.
      cache: whose rows have been read to the end (`step`). It is not decided then whether the last byte of a row ends
        a patch, and the states are those of the bytes before the ones given (`units.run`).
      key: noise of the policies of the layers over patches while training; None = none.
    aux: as `units.report` has it; with marks also boundary_accuracy among the metrics.
    """
    tokens = Tokens(batch.positions, batch.segments)
    x_btd, found = inlet(p, batch, tokens, None if cache is None else cache.parts.port, cfg)
    seen = Seen(x_btd, tokens, batch.ids % FUSED, batch.marks)
    x_btd, cache, notes = units.run(stage(p, cfg, key), seen, cache, ends)
    if cache is not None and found is not None:
        cache = cache.replace(parts=cache.parts.replace(port=found.state))
    aux = units.report(notes, batch, cfg.chunking)
    if batch.marks is not None:
        real, mark = batch.segments > 0, aux["boundaries"][0]
        agree = real & (mark == (batch.marks | (batch.positions == 0)))
        sums = (jnp.sum(a, dtype=jnp.float32) for a in (agree, real))
        aux["metrics"]["boundary_accuracy"] = jnp.stack(list(sums))
    return x_btd, cache, aux


def step(p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next byte of every row; rows whose byte ends a patch wait until enough others do.

    Args:
      batch: [b, 1]. Ids from 260 on end patches. Segment 1 in rows that go on, 0 in rows that don't. Rows that wait
        have the id that they wait with, and after `hidden` the last one again, with what has been decided of it.
      cache: of an earlier call. p: with the automaton's tables as "suffix" where the model has a table of subwords.
    Returns: states [b, 1, d], the cache, and ready bool [b], as `units.step` has them.
    """
    live = batch.segments[:, 0] > 0
    tokens = Tokens(cache.length[:, None], waiting.new_rows(cache, live)[:, None].astype(jnp.int32))
    x_b1d, found = inlet(p, batch, tokens, cache.parts.port, cfg)
    if found is not None:
        cache = cache.replace(parts=cache.parts.replace(port=found.state))
    seen, ends_b = Seen(x_b1d, tokens, batch.ids % FUSED), batch.ids[:, 0] >= FUSED
    return units.step(stage(p, cfg), seen, cache, live, enough(p, cfg, cache), ends_b)


def enough(p: Tree, cfg: BolmoConfig, cache: Memory) -> int:
    """How many rows should wait in `step`."""
    outer = [p[name] for name in ("encoder", "decoder", "unembed")]
    return waiting.enough(outer, p["main"], cache, cfg.capacity)


def encode(p: Tree, batch: Batch, cfg: BolmoConfig) -> jax.Array:
    """Encoder states [b, t, d] of a batch."""
    tokens = Tokens(batch.positions, batch.segments)
    return stage(p, cfg).encode(inlet(p, batch, tokens, None, cfg)[0], None, Place(tokens))[0]


def inlet(
    p: Tree, batch: Batch, tokens: Tokens, state_b: jax.Array | None, cfg: BolmoConfig
) -> tuple[jax.Array, Suffix | None]:
    """Embeddings [b, t, d] of bytes and their suffix subwords, and these subwords. state_b: i32 [b] of the automaton
    after earlier calls, or None."""
    x_btd, found = lookup(p["embed"], batch.ids % FUSED, cfg.dtype), batch.suffix
    if cfg.subwords:
        if found is None and state_b is not None and "suffix" in p:
            found = _subwords(p["suffix"], batch.ids, tokens, state_b)
        if found is None:
            raise AtomError("this model looks at the subword that ends at each byte: it needs its subword tokenizer")
        x_btd += lookup(p["subwords"], found.ids, cfg.dtype)
    return constrain(x_btd, "batch", None, None), found


def _subwords(tables: Any, ids_bt: jax.Array, tokens: Tokens, state_b: jax.Array) -> Suffix:
    """The subwords that end at each byte of a text that goes on."""

    def one(state_b: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        id_b, segment_b = inputs
        state_b = jnp.where(segment_b > 0, advance(tables, state_b, id_b, jnp), state_b)
        return state_b, state_b

    state_b, states = jax.lax.scan(one, state_b, (ids_bt.T, tokens.segments.T))
    return Suffix(tables.out[states.T], state_b)


def stage(p: Tree, cfg: BolmoConfig, key: jax.Array | None = None) -> Stage:
    """The parts of the only stage: bytes outside, patches inside. key: see `hidden`."""

    def encode(x_btd: jax.Array, states: Any, place: Place) -> tuple[jax.Array, Any, dict[str, tuple]]:
        x_btd, states = local(p, "encoder", x_btd, place.tokens, states, cfg)
        return rms_norm(x_btd, p["encoder_norm"], cfg.edge_eps), states, {}

    def inside(
        u_bm1d: jax.Array, boundary: Boundary, plan: Plan, newest_b1d: jax.Array, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None, Notes]:
        u_bmd = linear(p["pool"], u_bm1d[:, :, 0])
        with jax.named_scope("main"):
            v_bmd, memory, said = transformer.blocks(
                p["main"], u_bmd, plan.tokens, cfg=cfg.blocks, cache=memory, ids=plan.ids, key=key
            )
        return rms_norm(v_bmd, p["patch_norm"], cfg.edge_eps)[:, :, None], memory, Notes(memory=(said,))

    def combine(h_btd: jax.Array, w_btd: jax.Array, boundary: Boundary) -> jax.Array:
        return w_btd + linear(p["residual"], h_btd)

    def decode(y_btd: jax.Array, states: Any, place: Place) -> tuple[jax.Array, Any, dict[str, tuple]]:
        x_btd, states = local(p, "decoder", y_btd, place.tokens, states, cfg)
        return rms_norm(x_btd, p["norm"], cfg.main.norm_eps), states, {}

    mine, dtype = {"rule": p["rule"]}, jnp.dtype(cfg.dtype)
    return Stage(cfg.chunking[0], mine, cfg.main.d_model, dtype, encode, inside, combine, decode)


def linear(p: Tree, x: jax.Array) -> jax.Array:
    """x w + b."""
    y = project(x, p["w"])
    return y + jnp.broadcast_to(p["b"].astype(y.dtype), y.shape)


def local(
    p: Tree, name: str, x_btd: jax.Array, tokens: Tokens, states: tuple | None, cfg: BolmoConfig
) -> tuple[jax.Array, tuple | None]:
    """The layers of the "encoder" or of the "decoder": mLSTM and SwiGLU, pre-norm, no norm after the last."""
    eps, kinds = cfg.main.norm_eps, cfg.local[("encoder", "decoder").index(name)]

    def layer(kind: None, p: Tree, x: jax.Array, state: Any, others: None) -> tuple[jax.Array, Any, dict]:
        y, state = mlstm(p["mixer"], rms_norm(x, p["norm1"], eps), tokens, state, cfg.chunk)
        x = x + y
        x = x + swiglu(p["mlp"], rms_norm(x, p["norm2"], eps))
        return constrain(x, "batch", None, None), state, {}

    return layers.run_layers(layer, kinds, p[name], x_btd, states, remat=cfg.remat and states is None)[:2]
