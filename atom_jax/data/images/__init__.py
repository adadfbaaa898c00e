"""Images as documents: the bytes of their pixels, row by row.

A new one is one file and one entry of `PICTURES`.
"""

from __future__ import annotations

import numpy as np

from atom_jax import config
from atom_jax.data.corpus import Corpus, Texts
from atom_jax.data.images.digits import Digits
from atom_jax.data.images.files import File
from atom_jax.data.images.glyphs import Glyphs
from atom_jax.data.images.picture import Drawn, Pictures, png_bytes, read
from atom_jax.data.images.shapes import Shapes
from atom_jax.data.images.sprites import Sprites
from atom_jax.data.splits import BLOCK, take_split
from atom_jax.typing import AtomError

__all__ = ["PICTURES", "Digits", "Drawn", "File", "Glyphs", "Pictures", "Shapes", "Sprites", "arrays", "corpus",
           "parse", "png_bytes", "read"]  # fmt: skip

PICTURES: dict[str, type[Pictures]] = {kind.name: kind for kind in (Shapes, Sprites, Glyphs, Digits)}


def parse(text: str) -> Pictures:
    """The pictures that a text such as "shapes:size=16:most=6" or a path that ends in .npz names.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    if text.endswith(".npz"):
        return File(text)
    name, *fields = text.split(":")
    if name not in PICTURES:
        raise AtomError(f"image:{name}: expected one of {', '.join(PICTURES)}, or a file that ends in .npz")
    return config.build(PICTURES[name], fields, f"image:{name}:")


def corpus(pictures: Pictures, split: str) -> Corpus:
    """The images of a split, each the bytes of its pixels. Pictures without end are drawn when asked for; of others
    each is in one split, by `data.splits`, and those that are equal count once.
    Raises AtomError where these are too few."""
    if pictures.endless:
        return Drawn(pictures, split)
    found = dict.fromkeys(image.tobytes() for image in pictures.images())
    if len(found) < BLOCK and split != "all":
        raise AtomError(
            f"image:{pictures.name} holds {len(found)} images: from {BLOCK} on some are kept from training"
        )
    return take_split(Texts(f"image:{pictures.name}", list(found)), split, whole=True)


def arrays(pictures: Pictures, split: str, limit: int) -> np.ndarray:
    """The first images of a split, u8 [n, size, size, channels], n at most `limit`."""
    found = corpus(pictures, split)
    rows = [np.frombuffer(found.read(i), np.uint8) for i in range(min(limit, len(found)))]
    return np.stack(rows).reshape(-1, pictures.size, pictures.size, pictures.channels)
