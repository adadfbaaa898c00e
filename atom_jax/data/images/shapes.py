"""Rectangles of random places, sizes and grays, one over the other: images whose complexity is known."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.data.images.picture import Pictures
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Shapes(Pictures):
    """size: pixels along a side. most: rectangles at most; each number from 0 on is as likely. Their sides are 2 to
    size / 2 pixels, their grays and that of the ground anything."""

    size: int = 16
    most: int = 6

    name: ClassVar[str] = "shapes"
    endless: ClassVar[bool] = True

    def __post_init__(self):
        config.check(self, size=(4, 1024), most=(0, 1000))
        if self.size % 2:
            raise AtomError(f"size: expected an even number, got {self.size}")

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The number of rectangles is how much there is to see, though some may be hidden."""
        count = int(rng.integers(0, self.most + 1))
        image = np.full((self.size, self.size, 1), rng.integers(0, 256), np.uint8)
        for _ in range(count):
            height, width = rng.integers(2, self.size // 2 + 1, 2)
            top, left = rng.integers(0, self.size - height + 1), rng.integers(0, self.size - width + 1)
            image[top : top + height, left : left + width] = rng.integers(0, 256)
        return image, count
