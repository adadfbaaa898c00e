"""The forward pass over whole texts, for training, scoring and prompts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.chunking.config import slots_for
from atom_jax.chunking.plan import make_plan
from atom_jax.chunking.rules import lookahead
from atom_jax.chunking.segments import gather_unique, read_chunks
from atom_jax.chunking.types import END, Boundary, Plan, PlanState, Seen, last_real
from atom_jax.kvcache.dense import Cache
from atom_jax.models import stack, transformer
from atom_jax.models.bolmo.config import FUSED, BolmoConfig
from atom_jax.models.bolmo.memory import BolmoState
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.nn.linear import project
from atom_jax.nn.mlp import swiglu
from atom_jax.nn.mlstm import mlstm
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree
from atom_jax.sharding import constrain
from atom_jax.typing import AtomError, Batch, Output


def apply(p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Cache | None = None) -> tuple[Output, Cache | None]:
    """Logits float32 [b, t, 520] of every position, with what was learned in `aux` (see `hidden`), and the cache."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def logits(p: Tree, x_btd: jax.Array, *, cfg: BolmoConfig) -> jax.Array:
    """Logits float32 [b, t, 520] of final states."""
    out = jnp.einsum("btd,dv->btv", x_btd, p["unembed"].astype(x_btd.dtype), preferred_element_type=jnp.float32)
    return constrain(out, "batch", None, "vocab")


def hidden(
    p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Cache | None = None, key: jax.Array | None = None,
    ends: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, dict[str, Any]]:  # fmt: skip
    """Final normalised states [b, t, d], the cache after these bytes, and what was learned.

    Ids at the ends of patches count as what they are without them: where patches end the boundary predictor says,
    which sees the next byte too, or `ends` bool [b, t].

    Args:
      batch: needs `suffix` where the model has a table of subwords. Its `marks` are what the predictor is to learn.
      cache: an empty one, to read prompts. It is not decided then whether the last byte of a row ends a patch: the
        byte has passed the encoder only (`step` does the rest), and the state there is meaningless.
      key: not used.
    aux: boundaries (bool [b, t],), boundary_probs (float32 [b, t],), loss (float32 [], that of the predictor), lost
    (i32 [], patches for which there was no room) and metrics (see `models.hnet`).
    """
    tokens = Tokens(batch.positions, batch.segments)
    memory = None if cache is None else cache.layers
    if cache is not None and not cache.fresh:
        raise AtomError("a Bolmo reads prompts in one call; what comes after them goes through step")
    with jax.named_scope("encoder"):
        h_btd, encoder = encode(p, batch, cfg, None if memory is None else memory.encoder)
    boundary = lookahead.apply(p["rule"], Seen(h_btd, tokens, batch.ids, batch.marks), cfg=cfg.rule)
    if ends is not None:
        boundary = boundary.replace(mark=ends & (tokens.segments > 0))
    if memory is not None:
        tokens = tokens.replace(segments=jnp.where(_is_last(tokens), 0, tokens.segments))
        boundary = boundary.replace(mark=boundary.mark & (tokens.segments > 0))
    plan = layout(boundary, tokens, cfg)
    with jax.named_scope("main"):
        v_bmd, main, _ = transformer.blocks(
            p["main"],
            pool(p, h_btd, plan),
            plan.tokens,
            cfg=cfg.blocks,
            cache=None if memory is None else memory.main,
        )
        v_bmd = rms_norm(v_bmd, p["patch_norm"], cfg.edge_eps)
    with jax.named_scope("decoder"):
        x_btd, decoder = decode(p, v_bmd, h_btd, plan, tokens, cfg, None if memory is None else memory.decoder)
    aux = _aux(boundary, plan, batch)
    if cache is None:
        return x_btd, None, aux
    real, last = Tokens(batch.positions, batch.segments), jnp.minimum(plan.count, plan.at.shape[1]) - 1
    state = BolmoState(
        encoder,
        decoder,
        main,
        newest=read_chunks(v_bmd, memory.newest[:, 0], last[:, None]),
        h=last_real(h_btd, real, memory.h[:, 0])[:, None],
        read=jnp.any(batch.segments > 0, axis=1),
        suffix=memory.suffix if batch.suffix is None else batch.suffix.state,
    )
    return x_btd, Cache(state, jnp.sum(batch.segments > 0, axis=1, dtype=jnp.int32)), aux


def encode(p: Tree, batch: Batch, cfg: BolmoConfig, states: Any = None) -> tuple[jax.Array, Any]:
    """Normalised encoder states [b, t, d] of bytes and their suffix subwords, and the memory of the encoder."""
    x_btd = lookup(p["embed"], batch.ids % FUSED, cfg.dtype)
    if cfg.subwords:
        if batch.suffix is None:
            raise AtomError("this model looks at the subword that ends at each byte: it needs its subword tokenizer")
        x_btd += lookup(p["subwords"], batch.suffix.ids, cfg.dtype)
    x_btd = constrain(x_btd, "batch", None, None)
    x_btd, states = local(p["encoder"], x_btd, Tokens(batch.positions, batch.segments), states, cfg)
    return rms_norm(x_btd, p["encoder_norm"], cfg.edge_eps), states


def layout(boundary: Boundary, tokens: Tokens, cfg: BolmoConfig) -> Plan:
    """Where patches lie, of which there is room for `cfg.capacity` per byte."""
    b, t = boundary.mark.shape
    plan, _ = make_plan(boundary.replace(kind=END), tokens, slots_for(t, cfg.capacity), PlanState.empty(b))
    return plan


def pool(p: Tree, h_btd: jax.Array, plan: Plan) -> jax.Array:
    """Inputs [b, m, d] of the layers over patches: the encoder state of each patch's last byte, projected."""
    return linear(p["pool"], gather_unique(h_btd, plan.at, plan.tokens.segments > 0))


def decode(
    p: Tree, v_bmd: jax.Array, h_btd: jax.Array, plan: Plan, tokens: Tokens, cfg: BolmoConfig, states: Any = None
) -> tuple[jax.Array, Any]:
    """Final normalised states [b, t, d] from normalised patches v_bmd and encoder states h_btd, and the memory of the
    decoder. A byte reads the latest patch that has ended, its own where it ends one."""
    read_btd = read_chunks(v_bmd, jnp.zeros_like(v_bmd[:, 0]), plan.read)
    x_btd, states = local(p["decoder"], read_btd + linear(p["residual"], h_btd), tokens, states, cfg)
    return rms_norm(x_btd, p["norm"], cfg.main.norm_eps), states


def linear(p: Tree, x: jax.Array) -> jax.Array:
    """x w + b."""
    y = project(x, p["w"])
    return y + jnp.broadcast_to(p["b"].astype(y.dtype), y.shape)


def local(layers: Any, x_btd: jax.Array, tokens: Tokens, states: Any, cfg: BolmoConfig) -> tuple[jax.Array, Any]:
    """The layers of the encoder or of the decoder: mLSTM and SwiGLU, pre-norm, no norm after the last."""
    eps = cfg.main.norm_eps

    def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        p, state = inputs
        y, state = mlstm(p["mixer"], rms_norm(x, p["norm1"], eps), tokens, state, cfg.chunk)
        x = x + y
        x = x + swiglu(p["mlp"], rms_norm(x, p["norm2"], eps))
        return constrain(x, "batch", None, None), state

    return stack.run_layers(layer, layers, x_btd, states, cfg.remat and states is None)


def _is_last(tokens: Tokens) -> jax.Array:
    """bool [b, t]: the last real position of its row."""
    at = jnp.arange(tokens.segments.shape[1], dtype=jnp.int32)[None]
    return at == jnp.sum(tokens.segments > 0, axis=1, keepdims=True) - 1


def _aux(boundary: Boundary, plan: Plan, batch: Batch) -> dict[str, Any]:
    real, mark = batch.segments > 0, boundary.mark
    count, units = (jnp.sum(a, dtype=jnp.float32) for a in (real, mark))
    metrics = {"bytes_per_unit_0": jnp.stack([count, units])}
    if batch.marks is not None:
        agree = real & (mark == (batch.marks | (batch.positions == 0)))
        metrics["boundary_accuracy"] = jnp.stack([jnp.sum(agree, dtype=jnp.float32), count])
    return {
        "boundaries": (mark,),
        "boundary_probs": (jnp.where(real, boundary.p, 0.0),),
        "loss": boundary.loss,
        "lost": jnp.sum(plan.lost),
        "metrics": metrics,
    }
