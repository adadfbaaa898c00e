"""The record of Bolmo."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.chunking.config import slots_for
from atom_jax.models import transformer_family
from atom_jax.models.bolmo.config import BolmoConfig, roomier, spec
from atom_jax.models.bolmo.forward import apply, hidden, logits, step
from atom_jax.models.bolmo.ids import codec
from atom_jax.models.bolmo.memory import decode_params, init_cache, nodes
from atom_jax.models.bolmo.published import PUBLISHED
from atom_jax.models.family import Family
from atom_jax.models.flops import matrices
from atom_jax.nn import mlstm


def flops(cfg: BolmoConfig, length: int) -> float:
    """See `Family`."""
    tree, patches = spec(cfg), slots_for(length, cfg.capacity)
    outside = {k: v for k, v in tree.items() if k not in ("embed", "subwords", "pool", "main")}
    k, v = mlstm.sizes(cfg.main.d_model, cfg.local_heads)
    mixing = cfg.local_heads * (2 * min(cfg.chunk, length) * (k + v) + 4 * k * v)
    total = 2.0 * matrices(outside) + (cfg.encoder_layers + cfg.decoder_layers) * mixing
    inside = transformer_family.block_flops(cfg.main, patches) + 2 * matrices({"pool": tree["pool"]})
    return total + inside * patches / length


def describe(cfg: BolmoConfig) -> list[tuple[str, str]]:
    """See `Family`; "bytes" are the layers around those over patches."""
    local = f"{cfg.encoder_layers} encoder and {cfg.decoder_layers} decoder layers of {cfg.local_heads} mLSTM heads"
    suffixes = f", {cfg.subwords:,} suffix subwords" if cfg.subwords else ""
    return [
        ("bytes", f"{local}, width {cfg.main.d_model}, MLP {cfg.local_d_ff}"),
        ("patches", f"{cfg.main.family}, {transformer_family.sizes(cfg.main)}; room for {cfg.capacity:g} per byte"),
        ("vocabulary", f"{cfg.vocab_size:,}, separate output embedding{suffixes}"),
        ("positions", f"{cfg.max_length:,} bytes; of patches {transformer_family.positions(cfg.main)}"),
        *transformer_family.memory(cfg.main),
    ]


def examples() -> dict[str, BolmoConfig]:
    """See `Family`; the layers inside are those of any family of transformers."""
    sizes = dict(subwords=0, decoder_layers=2, local_heads=2, local_d_ff=48, capacity=1.0, chunk=16, max_length=512)
    inside = {f"{f.name}-{name}": cfg for f in transformer_family.FAMILIES for name, cfg in f.examples().items()}
    return {name: BolmoConfig(main=cfg, **sizes) for name, cfg in inside.items() if cfg.tie_embeddings}


def _with_memory(cfg: BolmoConfig, memory: Any) -> BolmoConfig:
    """That of the layers over patches."""
    return dataclasses.replace(cfg, main=dataclasses.replace(cfg.main, memory=memory))


FAMILY = Family(
    name="bolmo", config=BolmoConfig, spec=spec, apply=apply, hidden=hidden, logits=logits, init_cache=init_cache,
    nodes=nodes, step=step, decode_params=decode_params, roomier=roomier, flops=flops, describe=describe,
    examples=examples, published=PUBLISHED, memory=lambda cfg: cfg.main.memory, with_memory=_with_memory, codec=codec,
)  # fmt: skip
