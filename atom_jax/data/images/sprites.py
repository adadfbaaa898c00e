"""Frames of the world `video` (`data.envs`) one by one, for tokenizers of its images."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.data.envs import Video, video
from atom_jax.data.images.picture import Pictures


@config.register
@dataclasses.dataclass(frozen=True)
class Sprites(Pictures):
    """size, most, glyphs: as of `data.envs.Video`; each number of sprites from 1 on is as likely, and each place."""

    size: int = 32
    most: int = 3
    glyphs: str = "0123456789"

    name: ClassVar[str] = "sprites"
    endless: ClassVar[bool] = True

    def __post_init__(self):
        config.check(self)
        Video(self.size, self.most, glyphs=self.glyphs)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The number of sprites is how much there is to see, though some may be hidden."""
        known, count = video.sprites(self.glyphs), int(rng.integers(1, self.most + 1))
        side = known.shape[1]
        image = np.zeros((self.size, self.size), np.float32)
        for which in rng.integers(0, len(known), count):
            top, left = rng.integers(0, self.size - side + 1, 2)
            part = image[top : top + side, left : left + side]
            np.maximum(part, known[which], out=part)
        return np.rint(image * 255).astype(np.uint8)[..., None], count
