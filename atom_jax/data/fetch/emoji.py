"""Emoji, drawn with the font of a Debian package (Noto Color Emoji, SIL Open Font License).

corpora/emoji/emoji.npz holds "images" u8 [n, 32, 32, 3], on white, and "names", the characters that they show.
"""

from __future__ import annotations

import pathlib
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atom_jax.data.fetch import debian
from atom_jax.data.fetch.files import whole
from atom_jax.typing import AtomError

PACKAGES = ("fonts-noto-color-emoji",)
_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
# The only size that the font's pictures have, in pixels of its text.
_DRAWN, _SIZE = 109, 32


def fetch(target: pathlib.Path, cache: pathlib.Path) -> str:
    """Makes `target` from the package, and returns what is in it. Raises AtomError when it cannot be had."""
    return build(debian.unpack(PACKAGES, cache)[0] / _FONT, target)


def build(font: pathlib.Path, target: pathlib.Path) -> str:
    """Writes `target` whole: what the font shows of every single character. Raises AtomError for a file that is no
    such font."""
    from matplotlib.ft2font import FT2Font

    try:
        pen = ImageFont.truetype(str(font), _DRAWN, layout_engine=ImageFont.Layout.BASIC)
        codes = sorted(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError) as e:
        raise AtomError(f"{font}: not a font that can be read ({e})") from None
    images, names = [], []
    for code in codes:
        # Digits and signs of the keyboard are there too, as parts of others.
        if code < 128 or unicodedata.category(chr(code)) in ("Cf", "Mn", "Me", "Cn"):
            continue
        image = _drawn(pen, chr(code))
        if image is not None:
            images.append(image)
            names.append(chr(code))
    if not images:
        raise AtomError(f"{font}: shows no character")
    with whole(target) as part:
        np.savez_compressed(part / "emoji.npz", images=np.stack(images), names=np.array(names))
    return f"{len(images):,} emoji of {_SIZE} x {_SIZE} pixels"


def _drawn(pen: ImageFont.FreeTypeFont, text: str) -> np.ndarray | None:
    """u8 [32, 32, 3], or None for what leaves no mark."""
    left, top, right, bottom = pen.getbbox(text)
    side = max(right - left, bottom - top)
    if side < 1:
        return None
    image = Image.new("RGB", (side, side), "white")
    place = ((side - right + left) / 2 - left, (side - bottom + top) / 2 - top)
    ImageDraw.Draw(image).text(place, text, fill="black", font=pen, embedded_color=True)
    pixels = np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BOX))
    return pixels if pixels.min() < 255 else None
