"""The record of models that choose their own units."""

from __future__ import annotations

import itertools

from atom_jax.chunking.config import Chunking, slots_for
from atom_jax.models.family import Family
from atom_jax.models.flops import matrices
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.config import HNetConfig, roomier, spec
from atom_jax.models.hnet.examples import examples
from atom_jax.models.hnet.forward import apply, hidden, logits, stale, step, together
from atom_jax.models.hnet.memory import decode_params, init_cache, nodes
from atom_jax.models.hnet.published import PUBLISHED
from atom_jax.units import without_inside


def flops(cfg: HNetConfig, length: int) -> float:
    """See `Family`."""
    tree, positions = spec(cfg), length
    total = length * ports.of(cfg).operations(cfg)
    for s in range(cfg.stages):
        stage = tree[f"stage{s}"]
        total += 2.0 * positions * matrices({k: v for k, v in stage.items() if k not in ("join", "part")})
        for run in itertools.chain(*cfg.stacks(s)):
            total += len(run.kinds) * run.mixer.operations(cfg.width(s), positions)
        if s < cfg.stages - 1:
            chunks = slots_for(positions, cfg.chunking[s].capacity)
            total += 2.0 * chunks * matrices({k: v for k, v in stage.items() if k in ("join", "part")})
            positions = chunks
    return total / length


def describe(cfg: HNetConfig) -> list[tuple[str, str]]:
    """See `Family`; a stage takes two lines, its layers and how it finds its units."""
    lines = []
    for s in range(cfg.stages):
        lines.append((f"stage {s}", _layers(cfg, s)))
        if s < cfg.stages - 1:
            lines.append(("  units", _units(cfg.chunking[s])))
    return [*lines, ("vocabulary", ports.of(cfg).describe(cfg)), ("positions", f"{cfg.max_length:,}")]


def _layers(cfg: HNetConfig, s: int) -> str:
    mixers = dict.fromkeys(run.mixer for run in itertools.chain(*cfg.stacks(s)))
    parts = [" and ".join(cfg.layouts(s)), f"width {cfg.d_model[s]}"]
    if any(mixer.mlp for mixer in mixers):
        parts.append(f"MLP {cfg.d_intermediate[s]}")
    parts += dict.fromkeys(mixer.describe(cfg.width(s)) for mixer in mixers)
    return "layers " + ", ".join(parts)


def _units(chunking: Chunking) -> str:
    rule = type(chunking.rule).__name__
    return (
        f"{rule}, pool {chunking.pool}, upsampling {chunking.upsample}, room for {chunking.capacity:g} per position"
    )


FAMILY = Family(
    name="hnet", config=HNetConfig, spec=spec, apply=apply, hidden=hidden, logits=logits, init_cache=init_cache,
    nodes=nodes, step=step, decode_params=decode_params, roomier=roomier, flops=flops, describe=describe,
    examples=examples, published=PUBLISHED, together=together, stale=stale,
    outer=without_inside,
)  # fmt: skip
