"""Floating-point operations of a forward pass, counted from the sizes of its products."""

from __future__ import annotations

import math
from typing import Any

from atom_jax import params
from atom_jax.chunking.config import slots_for
from atom_jax.models import registry, stack
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.hnet import HNetConfig
from atom_jax.models.stack import Width
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import mlstm


def forward_flops(cfg: Any, length: int) -> float:
    """Operations (two per multiply-add) of the forward pass over one row of `length` tokens, per token.

    Matrix products, attention scores and state-space products count; norms, activations, gathers and the embedding
    don't. Learned units count as many chunks as are computed, used or not. Training costs three times as much (four
    with remat).
    """
    if isinstance(cfg, TransformerConfig):
        return _blocks(cfg, length) + 2 * cfg.d_model * cfg.vocab_size
    return _bolmo(cfg, length) if isinstance(cfg, BolmoConfig) else _hnet(cfg, length)


def _blocks(cfg: TransformerConfig, length: int) -> float:
    """Of a transformer's layers."""
    total = 2.0 * _matrices(registry.of(cfg).spec(cfg)["layers"])
    for i in range(cfg.n_layers):
        sliding = cfg.layer_types and cfg.layer_types[i] == "sliding"
        total += 4 * cfg.n_heads * cfg.head_dim * _keys(length, cfg.sliding_window if sliding else length)
    return total


def _bolmo(cfg: BolmoConfig, length: int) -> float:
    spec, patches = registry.of(cfg).spec(cfg), slots_for(length, cfg.capacity)
    outside = {k: v for k, v in spec.items() if k not in ("embed", "subwords", "pool", "main")}
    k, v = mlstm.sizes(cfg.main.d_model, cfg.local_heads)
    mixing = cfg.local_heads * (2 * min(cfg.chunk, length) * (k + v) + 4 * k * v)
    total = 2.0 * _matrices(outside) + (cfg.encoder_layers + cfg.decoder_layers) * mixing
    return total + (_blocks(cfg.main, patches) + 2 * _matrices({"pool": spec["pool"]})) * patches / length


def _hnet(cfg: HNetConfig, length: int) -> float:
    spec, positions = registry.of(cfg).spec(cfg), length
    total = 2.0 * length * cfg.d_model[0] * cfg.vocab_size
    for s in range(cfg.stages):
        stage = spec[f"stage{s}"]
        total += 2.0 * positions * _matrices({k: v for k, v in stage.items() if k not in ("join", "part")})
        for layout in cfg.layouts(s):
            total += sum(n * _mixing(letter, cfg.width(s), positions) for letter, n in stack.parse(layout))
        if s < cfg.stages - 1:
            chunks = slots_for(positions, cfg.chunking[s].capacity)
            total += 2.0 * chunks * _matrices({k: v for k, v in stage.items() if k in ("join", "part")})
            positions = chunks
    return total / length


def _mixing(letter: str, width: Width, positions: int) -> float:
    """Operations in which positions meet, over a row."""
    if letter in "mM":
        e, n = width.ssm.expand * width.d, width.ssm.d_state
        block = min(width.ssm.chunk, positions)
        return positions * (2 * block * (n + e) + 4 * e * n)
    window = positions if width.window < 0 else width.window + 1
    return (8 if letter == "x" else 4) * positions * width.d * _keys(positions, window)


def _keys(length: int, window: int) -> float:
    """Keys that a query sees, on average over a row."""
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _matrices(spec: Any) -> int:
    """Scalars in the matrices of a spec tree, all layers together."""
    flat = params.flatten(spec)
    return sum(math.prod(s.shape) for s in flat.values() if sum(a != "layers" for a in s.axes) >= 2)
