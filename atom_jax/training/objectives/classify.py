"""Classes of images."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.data.images import labelled
from atom_jax.models import cct
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Rows, Setting, register
from atom_jax.training.plots import Pages
from atom_jax.typing import IMAGES, AtomError


@struct.dataclass
class Rowed:
    """bytes u8 [b, t]: an image's pixels, row after row, and its class. loss_mask: bool [b], which rows hold one."""

    bytes: jax.Array
    loss_mask: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of the class of an image (`data.images.labelled`), for `models.cct`.

    shift: while training, images move by up to so many pixels in both directions, drawn anew every time; what comes
        in from outside is 0.
    """

    shift: int = 0

    name: ClassVar[str] = "classify"
    reads: ClassVar[str] = IMAGES
    pages: ClassVar[Pages] = {"loss": {"nats per image": {"loss": ""}, "share of images right": {"accuracy": ""}}}

    def __post_init__(self):
        config.check(self, shift=(0, 512))

    def check(self, exp: Any) -> None:
        """Rows must be images of the model's size, with their classes."""
        cfg, data = exp.model, exp.data
        if not isinstance(cfg, cct.CCTConfig):
            raise AtomError(f"classify: model must be a CCTConfig, not a {type(cfg).__name__}")
        if exp.tokenizer != "pixels":
            raise AtomError(f"classify: tokenizer must be pixels, not {exp.tokenizer!r}")
        for source in data.sources:
            if not source.startswith("labelled:"):
                raise AtomError(f"classify: data.sources must be labelled images (labelled:NAME), not {source!r}")
            size = labelled.parse(source.removeprefix("labelled:")).size
            if (size, 1) != (cfg.size, cfg.channels):
                raise AtomError(
                    f"classify: {source} is {size} x {size} in gray, the model's are {cfg.size} with {cfg.channels}"
                )
        if data.seq_len != cfg.max_length or not data.whole:
            raise AtomError(f"classify: set data.whole, and data.seq_len to the {cfg.max_length} bytes of an image")

    def batch(self, rows: Rows) -> Rowed:
        """The rows' bytes."""
        return Rowed(rows["ids"].astype(np.uint8), (rows["segments"] == 1).all(axis=1))

    def loss(
        self, params: Any, batch: Rowed, key: jax.Array | None, step: Any, *, setting: Setting, counts: Any = None
    ) -> Sums:
        """Also the share of images whose class is the likeliest."""
        cfg = setting.exp.model
        image = batch.bytes[:, :-1].reshape(-1, cfg.size, cfg.size, cfg.channels).astype(jnp.float32) / 255
        label_b, mask_b = batch.bytes[:, -1].astype(jnp.int32), batch.loss_mask.astype(jnp.float32)
        if self.shift and key is not None:
            image = shifted(image, key, self.shift)
        logits = cct.classify(params, image, cfg).logits
        nats_b = -jnp.take_along_axis(jax.nn.log_softmax(logits), label_b[:, None], axis=1)[:, 0]
        right = jnp.sum((jnp.argmax(logits, axis=1) == label_b) * mask_b)
        nats, count = jnp.sum(nats_b * mask_b), jnp.sum(batch.loss_mask, dtype=jnp.int32)
        return Sums(nats, nats, count, None, {"accuracy": jnp.stack([right, mask_b.sum()])})


def shifted(image_bhwc: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Images moved by up to `most` pixels down or up and right or left, each for itself."""
    _, height, width, c = image_bhwc.shape
    padded = jnp.pad(image_bhwc, ((0, 0), (most, most), (most, most), (0, 0)))
    corner = jax.random.randint(key, (len(image_bhwc), 2), 0, 2 * most + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, c))  # noqa: E731
    return jax.vmap(cut)(padded, corner)
