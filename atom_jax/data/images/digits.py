"""Handwritten digits of scikit-learn's (1,797 of 8 x 8 pixels)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.data.images.picture import Pictures
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Digits(Pictures):
    """The digits as they are."""

    name: ClassVar[str] = "digits"
    size = 8

    def images(self) -> np.ndarray:
        """All of them."""
        return labelled()[0]


def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Images u8 [1797, 8, 8, 1] and what they show, i64 [1797]. Raises AtomError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise AtomError("image:digits needs scikit-learn: pip install 'atom-jax[vision]'") from None
    found = load_digits()
    # From 0 to 16 there.
    return np.round(found.images[..., None] * (255 / 16)).astype(np.uint8), found.target
