"""The record of recurrent memory transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.models import transformer_family
from atom_jax.models.family import Family, Node
from atom_jax.models.rmt.config import RMTConfig, roomier, spec
from atom_jax.models.rmt.forward import apply, decode_params, hidden, init_cache, logits, step
from atom_jax.models.transformer import TransformerConfig


def flops(cfg: RMTConfig, length: int) -> float:
    """See `Family`; of a row that holds one document. Segments are computed whole."""
    tokens, copies = min(cfg.segment, length), 1 if length <= cfg.segment else 2
    places = tokens + copies * cfg.memory_tokens
    blocks = -(-length // tokens) * places * transformer_family.block_flops(cfg.blocks, places)
    return blocks / length + 2 * cfg.main.d_model * cfg.main.vocab_size


def describe(cfg: RMTConfig) -> list[tuple[str, str]]:
    """See `Family`; "segments" are what the transformer sees at a time."""
    main = dict(transformer_family.describe(cfg.blocks))
    return [
        ("sizes", f"{cfg.main.family}, {main['sizes']}"),
        ("vocabulary", main["vocabulary"]),
        ("segments", f"{cfg.segment:,} tokens, {cfg.memory_tokens} memory tokens from each to the next"),
        ("positions", f"{cfg.max_length:,} tokens; of a segment {main['positions']}"),
    ]


def examples() -> dict[str, RMTConfig]:
    """See `Family`: several segments, and layers of another kind inside."""
    inside = {f.name: f.examples() for f in transformer_family.FAMILIES}
    return {
        "llama-plain": RMTConfig(main=inside["llama"]["plain"], memory_tokens=3, segment=8, max_length=512),
        "olmo3-sliding": RMTConfig(main=inside["olmo3"]["sliding"], memory_tokens=2, segment=11, max_length=512),
    }


def _nodes(cfg: RMTConfig) -> tuple[Node]:
    return (Node((cfg.blocks.attentions,), cfg.max_length),)


def _with_memory(cfg: RMTConfig, memory: Any) -> RMTConfig:
    """That of the transformer, which no layer of it can have here (`registry.check_memory`)."""
    return dataclasses.replace(cfg, main=dataclasses.replace(cfg.main, memory=memory))


def _parts(cfg: RMTConfig) -> dict[str, TransformerConfig]:
    return {"main": cfg.main}


def _together(cfg: RMTConfig) -> RMTConfig:
    """Any cut of a text into calls gives the same."""
    return cfg


FAMILY = Family(
    name="rmt", config=RMTConfig, spec=spec, apply=apply, hidden=hidden, logits=logits, init_cache=init_cache,
    nodes=_nodes, step=step, decode_params=decode_params, roomier=roomier, flops=flops, describe=describe,
    examples=examples, together=_together, with_memory=_with_memory,
    parts=_parts,
)  # fmt: skip
