"""What images of a kind offer, and what is known of any image."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from typing import ClassVar

import numpy as np
from PIL import Image

from atom_jax.data.corpus import crc_of
from atom_jax.files import read_regular
from atom_jax.typing import AtomError

SPLITS = ("train", "validation", "test")
DRAWN = 2**20
_SAMPLE = 32
# Others, such as EPS, are programs.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Base of all: frozen configurations with a field or property `size`, the pixels along each side.

    channels: 1 for gray, 3 for colours. endless: whether `draw` makes them, else `images` holds them all.
    """

    name: ClassVar[str] = ""
    endless: ClassVar[bool] = False
    channels = 1

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """An image u8 [size, size, channels], and how much there is to see in it."""
        raise NotImplementedError

    def images(self) -> np.ndarray:
        """All images, u8 [n, size, size, channels]. Raises AtomError where they cannot be had."""
        raise NotImplementedError


class Drawn:
    """Images without end, made when asked for: a `data.corpus.Corpus` of DRAWN of them.

    Image i is drawn with a counter-based generator of (the split, i), so that it is the same wherever it is read.
    """

    endless = True

    def __init__(self, pictures: Pictures, split: str):
        self.pictures, self.split, self.what = pictures, split, f"image:{pictures.name}"
        self.sizes = None

    @functools.cached_property
    def crc(self) -> int:
        return crc_of([repr(self.pictures).encode(), *map(self.read, range(_SAMPLE))])

    def __len__(self) -> int:
        return DRAWN

    def drawn(self, i: int) -> tuple[np.ndarray, int]:
        """Image i, and how much there is to see in it."""
        number = ("all", *SPLITS).index(self.split)
        return self.pictures.draw(np.random.Generator(np.random.Philox(key=[number, i])))

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """As of a Corpus."""
        return self.drawn(i)[0].tobytes()[start:stop]


def png_bytes(image: np.ndarray) -> int:
    """Bytes of an image u8 [h, w, c] as a PNG file: what a program that knows nothing of it needs."""
    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, "PNG", optimize=True)
    return out.tell()


def read(path: str | os.PathLike, size: int, channels: int) -> np.ndarray:
    """The image of a file as u8 [size, size, channels], reduced or enlarged to that size; in gray for one channel,
    and on white where it is transparent. Raises AtomError for files that are no square image, or whose pixels have
    more than 16 bits."""
    try:
        content = read_regular(path)
    except OSError as e:
        raise AtomError(f"{path}: {e.strerror}") from None
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as found:
            # Known before anything is decompressed.
            size_wh = found.size
            image = _opaque(found) if size_wh[0] == size_wh[1] else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise AtomError(f"{path}: not an image that can be read") from None
    if size_wh[0] != size_wh[1]:
        raise AtomError(f"{path}: {size_wh[0]} x {size_wh[1]} pixels; expected a square image")
    if image is None:
        raise AtomError(f"{path}: its pixels have more than 16 bits")
    image = image.convert("L" if channels == 1 else "RGB")
    image = image if image.width == size else image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _opaque(found: Image.Image) -> Image.Image | None:
    """An image of 8 bits on white. None for more than 16 bits, whose range is unknown; PIL's own conversion would cut
    16 bits off at 255."""
    if found.mode.startswith("I;16") or (found.mode == "I" and found.format == "PNG"):
        return Image.fromarray((np.asarray(found, np.int32) // 257).astype(np.uint8))
    if found.mode in ("I", "F"):
        return None
    if "transparency" in found.info or found.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        colours = found.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", found.size, "white"), colours)
    found.load()
    return found.copy()
