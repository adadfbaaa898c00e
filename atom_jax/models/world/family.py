"""The record of world models."""

from __future__ import annotations

import jax

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.change import Change
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.kvcache.memory import Memory
from atom_jax.models.family import Family
from atom_jax.models.flops import matrices
from atom_jax.models.hnet import family as hnet
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.config import roomier
from atom_jax.models.hnet.memory import decode_params, init_cache, nodes
from atom_jax.models.hnet.ports import Cells, Codes, Pixels
from atom_jax.models.image_tokens import FSQ, ImageTokensConfig
from atom_jax.models.world.config import WorldConfig, spec
from atom_jax.models.world.forward import apply, hidden, logits
from atom_jax.params import Tree
from atom_jax.typing import FRAMES, Frames


def step(p: Tree, batch: Frames, *, cfg: WorldConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next frame of every row. Rows do not wait: where no row has a unit, the main network rests."""
    x_b1e, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
    return x_b1e, cache, batch.segments[:, 0] > 0


def flops(cfg: WorldConfig, length: int) -> float:
    """See `Family`."""
    return hnet.flops(cfg, length) + 2.0 * matrices(spec(cfg)["head"])


def describe(cfg: WorldConfig) -> list[tuple[str, str]]:
    """See `Family`."""
    of = f", {cfg.secrets} values of what is hidden" if cfg.secrets else ""
    return [*hnet.describe(cfg), ("head", f"width {cfg.hidden}, rewards as {cfg.reward}{of}")]


def examples() -> dict[str, WorldConfig]:
    """See `Family`."""
    return {
        "surprise": _small(Surprise(), "first"),
        "change": _small(Change(), "first", reward="scalar"),
        "cosine": _small(Cosine(target=2.0), "first", mix="ema", confidence=True, residual="linear"),
        "fixed": _small(Fixed(3), "mean", secrets=4),
        "pixels": _small(Surprise(), "first", Pixels((4, 4, 1), patch=2, actions=4, hidden=24)),
        "codes": _small(Surprise(), "first", Codes(_tokenizer(), actions=4, hidden=24)),
    }


def _tokenizer() -> ImageTokensConfig:
    return ImageTokensConfig(
        size=4, patch=2, registers=3, d_model=8, d_ff=8, n_heads=2, encoder_layers=1, decoder_layers=1,
        quantiser=FSQ((4, 3)),
    )  # fmt: skip


def _small(
    rule: object, pool: str, port: object = None, reward: str = "classes", secrets: int = 0, **changes: object
) -> WorldConfig:
    units = Chunking(**{"rule": rule, "pool": pool, "residual": "identity", "capacity": 1.0} | changes)
    return WorldConfig(
        port=port or Cells(grid=(3, 3), classes=8, actions=4, hidden=24), layout=("T1", "T1", "T1"),
        d_model=(16, 16), d_intermediate=(24, 24), n_heads=(2, 2), rotary_dim=(4, 4), window=(1, -1),
        chunking=(units,), init_std=0.3, hidden=24, reward=reward, secrets=secrets, max_length=512,
    )  # fmt: skip


FAMILY = Family(
    name="world", config=WorldConfig, spec=spec, apply=apply, hidden=hidden, logits=logits, init_cache=init_cache,
    nodes=nodes, step=step, decode_params=decode_params, roomier=roomier, flops=flops, describe=describe,
    examples=examples, reads=FRAMES, parts=ports.parts,
)  # fmt: skip
