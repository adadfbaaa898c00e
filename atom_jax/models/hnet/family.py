"""The record of models that choose their own units."""

from __future__ import annotations

from atom_jax.chunking.config import Chunking, slots_for
from atom_jax.models import stack
from atom_jax.models.family import Family
from atom_jax.models.flops import keys, matrices
from atom_jax.models.hnet.config import HNetConfig, read_whole, roomier, spec
from atom_jax.models.hnet.examples import examples
from atom_jax.models.hnet.forward import apply, hidden, logits
from atom_jax.models.hnet.memory import cache_use, decode_params, full, grow, init_cache, unstack
from atom_jax.models.hnet.waiting import step
from atom_jax.models.stack import Width


def flops(cfg: HNetConfig, length: int) -> float:
    """See `Family`."""
    tree, positions = spec(cfg), length
    total = 2.0 * length * cfg.d_model[0] * cfg.vocab_size
    for s in range(cfg.stages):
        stage = tree[f"stage{s}"]
        total += 2.0 * positions * matrices({k: v for k, v in stage.items() if k not in ("join", "part")})
        for layout in cfg.layouts(s):
            total += sum(n * _mixing(letter, cfg.width(s), positions) for letter, n in stack.parse(layout))
        if s < cfg.stages - 1:
            chunks = slots_for(positions, cfg.chunking[s].capacity)
            total += 2.0 * chunks * matrices({k: v for k, v in stage.items() if k in ("join", "part")})
            positions = chunks
    return total / length


def _mixing(letter: str, width: Width, positions: int) -> float:
    """Operations in which positions meet, over a row."""
    if letter in "mM":
        e, n = width.ssm.expand * width.d, width.ssm.d_state
        block = min(width.ssm.chunk, positions)
        return positions * (2 * block * (n + e) + 4 * e * n)
    window = positions if width.window < 0 else width.window + 1
    return (8 if letter == "x" else 4) * positions * width.d * keys(positions, window)


def describe(cfg: HNetConfig) -> list[tuple[str, str]]:
    """See `Family`; a stage takes two lines, its layers and how it finds its units."""
    lines = []
    for s in range(cfg.stages):
        lines.append((f"stage {s}", _layers(cfg, s)))
        if s < cfg.stages - 1:
            lines.append(("  units", _units(cfg.chunking[s])))
    tied, grams = "tied" if cfg.tie_embeddings else "separate", ", ".join(map(str, cfg.ngrams))
    extra = f", {cfg.ngram_rows:,} rows for n-grams of each length in {grams}" if grams else ""
    return [
        *lines,
        ("vocabulary", f"{cfg.vocab_size:,}, {tied} output embedding{extra}"),
        ("positions", f"{cfg.max_length:,}"),
    ]


def _layers(cfg: HNetConfig, s: int) -> str:
    letters = {letter for layout in cfg.layouts(s) for letter, _ in stack.parse(layout)}
    parts = [" and ".join(cfg.layouts(s)), f"width {cfg.d_model[s]}"]
    if letters & set("MTx"):
        parts.append(f"MLP {cfg.d_intermediate[s]}")
    if letters & set("tTx"):
        slides = letters & set("tT") and cfg.window[s] >= 0
        parts.append(f"{cfg.n_heads[s]} heads" + (f" with a window of {cfg.window[s] + 1}" if slides else ""))
    if letters & set("mM"):
        parts.append(f"SSM states of {cfg.ssm.d_state}")
    return "layers " + ", ".join(parts)


def _units(chunking: Chunking) -> str:
    rule = type(chunking.rule).__name__
    return (
        f"{rule}, pool {chunking.pool}, upsampling {chunking.upsample}, room for {chunking.capacity:g} per position"
    )


FAMILY = Family(
    name="hnet",
    config=HNetConfig,
    spec=spec,
    apply=apply,
    hidden=hidden,
    logits=logits,
    init_cache=init_cache,
    full=full,
    grow=grow,
    unstack=unstack,
    cache_use=cache_use,
    read_whole=read_whole,
    step=step,
    decode_params=decode_params,
    roomier=roomier,
    flops=flops,
    describe=describe,
    examples=examples,
)
