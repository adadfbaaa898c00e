"""The record of tokenizers of images."""

from __future__ import annotations

import math

from atom_jax.models.family import Kind
from atom_jax.models.flops import matrices
from atom_jax.models.image_tokens.config import ImageTokensConfig, spec
from atom_jax.models.image_tokens.halting import Halting
from atom_jax.models.image_tokens.lengths import Nested, Told, Whole
from atom_jax.models.image_tokens.quantise import FSQ, VQ, Continuous
from atom_jax.models.image_tokens.rounds import Rounds
from atom_jax.typing import IMAGES


def flops(cfg: ImageTokensConfig, length: int) -> float:
    """See `Kind`; tokens are bytes of pixels here, an image has `cfg.max_length`, and training's passes count."""
    return operations(cfg, cfg.length.passes(cfg)) / cfg.max_length


def operations(cfg: ImageTokensConfig, passes: tuple[float, float]) -> float:
    """Of an image that goes through encoder and decoder so many times, counted as `Kind.flops` does."""
    tree, tokens = spec(cfg), cfg.patches + cfg.registers
    total = 0.0
    for name, layers, count in zip(("encoder", "decoder"), (cfg.encoder_layers, cfg.decoder_layers), passes):
        products = tokens * matrices({"blocks": tree[name]["blocks"]}) + 2 * layers * cfg.d_model * tokens**2
        total += 2.0 * count * products
    return total


def describe(cfg: ImageTokensConfig) -> list[tuple[str, str]]:
    """See `Kind`."""
    codes = cfg.quantiser.codes
    bits = f"{codes:,} codes, {math.log2(codes):.1f} bits a token" if codes else "no codes"
    colours = {1: "gray"}.get(cfg.channels, f"{cfg.channels} channels")
    return [
        ("images", f"{cfg.size} x {cfg.size}, {colours}, in {cfg.patches} patches of {cfg.patch} x {cfg.patch}"),
        ("tokens", f"up to {cfg.registers}, {type(cfg.length).__name__}, {type(cfg.quantiser).__name__}: {bits}"),
        ("layers", f"{cfg.encoder_layers} and {cfg.decoder_layers}, width {cfg.d_model}, MLP {cfg.d_ff}"),
    ]


def examples() -> dict[str, ImageTokensConfig]:
    """See `Kind`."""

    def small(**changes) -> ImageTokensConfig:
        sizes = {"size": 8, "registers": 4, "d_model": 16, "d_ff": 24, "n_heads": 2, "encoder_layers": 1}
        return ImageTokensConfig(**sizes | {"decoder_layers": 1, "quantiser": FSQ((4, 5, 3))} | changes)

    return {
        "flex": small(),
        "vector": small(length=Nested("uniform_pow2", dropped="vector"), channels=3),
        "fixed": small(length=Whole(), quantiser=Continuous(6)),
        "elastic": small(length=Told(), mask="full", quantiser=FSQ((4, 5, 3), "elastic")),
        "alit": small(length=Rounds(2), mask="full", quantiser=VQ(16, 6)),
        "karl": small(length=Halting((0.02, 0.1, 0.3), hidden=8), mask="full", quantiser=VQ(16, 6)),
    }


FAMILY = Kind(
    name="image_tokens", config=ImageTokensConfig, spec=spec, flops=flops, describe=describe, examples=examples,
    reads=IMAGES,
)  # fmt: skip
