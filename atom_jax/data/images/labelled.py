"""Small gray images with their classes, as documents: the bytes of a square's pixels, row after row, then the class.

A new kind is one class and one entry of `KINDS`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atom_jax import config
from atom_jax.data.corpus import crc_of
from atom_jax.data.images import digits
from atom_jax.data.images.picture import SPLITS
from atom_jax.typing import AtomError

_SAMPLE = 32


@dataclasses.dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, each pixel repeated up to the size: in an order that is
    drawn once, the first 1,000 are train, 200 validation, the others test. (The UCI machine learning repository's;
    scikit-learn has the part that was its test set.)"""

    name: ClassVar[str] = "digits"
    size: int = 16

    def __post_init__(self):
        config.check(self, size=(8, 512))
        if self.size % 8:
            raise AtomError(f"labelled:digits: size {self.size} is no multiple of 8")

    def count(self, split: str) -> int:
        """Images of a split."""
        return {"train": 1000, "validation": 200, "test": 597, "all": 1797}[split]

    def read(self, split: str, i: int) -> tuple[np.ndarray, int]:
        """Image i of a split, u8 [size, size], 255 = ink, and its class. Raises AtomError without scikit-learn."""
        images, labels, order = _digits()
        number = order[{"train": 0, "validation": 1000, "test": 1200, "all": 0}[split] + i]
        return images[number].repeat(self.size // 8, 0).repeat(self.size // 8, 1), int(labels[number])


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, labels = digits.labelled()
    order = np.random.Generator(np.random.Philox(key=8)).permutation(len(labels))
    return images[..., 0], labels, order


@dataclasses.dataclass(frozen=True)
class Numerals:
    """The numerals 0 to 9 in six fonts (DejaVu, which comes with matplotlib), each drawn at a size, a place, an angle
    and with noise of its own."""

    name: ClassVar[str] = "numerals"
    size: int = 16

    def __post_init__(self):
        config.check(self, size=(8, 512))

    def count(self, split: str) -> int:
        """Images of a split."""
        return {"train": 20_000, "validation": 1000, "test": 1000, "all": 22_000}[split]

    def read(self, split: str, i: int) -> tuple[np.ndarray, int]:
        """As of `Digits`; drawn from the split and i, the same wherever it is read."""
        if split == "all":
            split, i = next((s, i - n) for s, n in (("test", 21_000), ("validation", 20_000), ("train", 0)) if i >= n)
        rng = np.random.Generator(np.random.Philox(key=[SPLITS.index(split), i]))
        label = int(rng.integers(10))
        return _drawn(str(label), self.size, rng), label


def _drawn(text: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """u8 [size, size]: a text near the middle."""

    font = _font(int(rng.integers(len(_FONTS))), round(size * rng.uniform(0.75, 1.0)))
    image = Image.new("L", (2 * size, 2 * size))
    place = size + rng.uniform(-size / 10, size / 10, 2)
    ImageDraw.Draw(image).text(tuple(place), text, fill=int(rng.integers(150, 256)), font=font, anchor="mm")
    image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    corner = size // 2
    pixels = np.asarray(image, np.float32)[corner : corner + size, corner : corner + size]
    return np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)


_FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "SansMono")


@functools.cache
def _font(number: int, size: int) -> Any:
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVu{_FONTS[number]}.ttf"
    return ImageFont.truetype(path, size)


KINDS: dict[str, type] = {kind.name: kind for kind in (Digits, Numerals)}


def parse(text: str) -> Any:
    """The kind that a text such as "digits:size=16" names. Raises AtomError for an unknown name, an unknown field or
    an unreadable value."""
    name, *fields = text.split(":")
    if name not in KINDS:
        raise AtomError(f"labelled:{name}: expected one of {', '.join(KINDS)}")
    return config.build(KINDS[name], fields, f"labelled:{name}:")


class Labelled:
    """The images of one split of a kind: a `data.corpus.Corpus`."""

    def __init__(self, kind: Any, split: str):
        self.kind, self.split, self.what = kind, split, f"labelled:{kind.name}"
        self.sizes = np.full(kind.count(split), kind.size**2 + 1, np.int64)

    @functools.cached_property
    def crc(self) -> int:
        return crc_of([repr(self.kind).encode(), *map(self.read, range(min(_SAMPLE, len(self))))])

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """As of a Corpus."""
        pixels, label = self.kind.read(self.split, i)
        return (pixels.tobytes() + bytes([label]))[start:stop]


def arrays(source: str, split: str, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` images (0: all) of a split of what `parse` reads, f32 [n, size, size, 1] in [0, 1], and their
    classes i32 [n]."""
    kind = parse(source)
    count = kind.count(split)
    found = [kind.read(split, i) for i in range(min(limit, count) if limit else count)]
    pixels, labels = zip(*found)
    return np.stack(pixels)[..., None].astype(np.float32) / 255, np.array(labels, np.int32)
