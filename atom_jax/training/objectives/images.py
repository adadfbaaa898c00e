"""Tokenizers of images: what goes in should come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.data import images
from atom_jax.models.image_tokens import ImageTokensConfig
from atom_jax.nn import vit
from atom_jax.tokenizers import PixelTokenizer
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Rows, Setting, forward_flops, register
from atom_jax.training.plots import Pages
from atom_jax.typing import IMAGES, AtomError


@struct.dataclass
class Pixels:
    """Images: ids i32 [b, t], the bytes of their pixels; loss_mask bool [b, t], all True."""

    ids: jax.Array
    loss_mask: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Images(Objective):
    """The squared error of pixels in [0, 1], with what a tokenizer's quantiser and its length add. It is reported in
    place of nats, per number of an image."""

    name: ClassVar[str] = "images"
    reads: ClassVar[str] = IMAGES
    pages: ClassVar[Pages] = {"loss": {"squared error": {"loss": ""}, "tokens": {"tokens": ""}}}

    def __post_init__(self):
        config.check(self)

    def check(self, exp: Any) -> None:
        """Rows must be images of the model's size."""
        cfg, data = exp.model, exp.data
        if not isinstance(cfg, ImageTokensConfig):
            raise AtomError(f"images: model must be an ImageTokensConfig, not a {type(cfg).__name__}")
        if exp.tokenizer != "pixels":
            raise AtomError(f"images: tokenizer must be pixels, not {exp.tokenizer!r}")
        for source in data.sources:
            if not source.startswith("image:"):
                raise AtomError(f"images: data.sources must be images (image:NAME), not {source!r}")
            found = images.parse(source.removeprefix("image:"))
            if (found.size, found.channels) != (cfg.size, cfg.channels):
                theirs = f"{found.size} x {found.size} with {found.channels} channels"
                raise AtomError(f"images: {source} is {theirs}, the model's are {cfg.size} with {cfg.channels}")
        if data.seq_len != cfg.max_length or not data.whole:
            raise AtomError(f"images: set data.whole, and data.seq_len to an image's {cfg.max_length} bytes")

    def tokenizer(self, exp: Any) -> PixelTokenizer:
        """Bytes."""
        return PixelTokenizer()

    def batch(self, rows: Rows) -> Pixels:
        """A row is an image."""
        return Pixels(rows["ids"], rows["segments"] > 0)

    def unit(self, exp: Any) -> tuple[str, int]:
        """Images, whose pixels are the targets."""
        return self.reads, exp.model.max_length

    def loss(self, params: Any, batch: Pixels, key: Any, step: Any, *, setting: Setting, counts: Any = None) -> Sums:
        """See above. learned: tokens, a mean over the images."""
        cfg = setting.exp.model
        x_bpc = patches(batch.ids, cfg)
        out = cfg.length.train(params, x_bpc, key, cfg)
        said = {name: jnp.stack([value * len(x_bpc), len(x_bpc)]) for name, value in out.said.items()}
        return sums(x_bpc, out.patches, said).replace(objective=out.loss * x_bpc.size)

    def judge(self, params: Any, batch: Pixels, *, setting: Setting) -> Sums:
        """Without noise, with all tokens. learned: error_NAME of every other length whose number is a power of two
        among those on offer."""
        cfg = setting.exp.model
        x_bpc = patches(batch.ids, cfg)
        out = cfg.length.choices(params, x_bpc, cfg)
        labels, said = cfg.length.labels(cfg), {}
        said["tokens"] = jnp.stack([jnp.mean(out.tokens[-1].astype(jnp.float32)) * len(x_bpc), len(x_bpc)])
        for i in (2**n - 1 for n in range((len(labels) - 1).bit_length())):
            error = jnp.sum(jnp.square(out.patches[i] - x_bpc))
            said[f"error_{labels[i].removeprefix('error ')}"] = jnp.stack([error, x_bpc.size])
        return sums(x_bpc, out.patches[-1], said)

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """Nothing is done twice."""
        return 3 * forward_flops(setting.exp) * setting.exp.data.batch_size * setting.exp.data.seq_len, 0.0


def patches(ids_bt: jax.Array, cfg: ImageTokensConfig) -> jax.Array:
    """Bytes of images as patches f32 [b, p, c] of numbers in [0, 1]."""
    images = ids_bt.astype(jnp.float32).reshape(-1, cfg.size, cfg.size, cfg.channels) / 255
    return vit.patches(images, cfg.patch)


def sums(x_bpc: jax.Array, out_bpc: jax.Array, said: dict[str, jax.Array]) -> Sums:
    """The squared error of images."""
    error = jnp.sum(jnp.square(out_bpc - x_bpc))
    return Sums(error, error, jnp.int32(x_bpc.size), None, said)
