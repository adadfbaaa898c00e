"""Letters and signs of the DejaVu fonts, which come with matplotlib."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atom_jax import config
from atom_jax.data.images.picture import Pictures
from atom_jax.typing import AtomError

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")


@config.register
@dataclasses.dataclass(frozen=True)
class Glyphs(Pictures):
    """White on black, one in each image, about as high as it. size: pixels along a side. fonts: files of matplotlib's
    (`matplotlib.get_data_path()`/fonts/ttf), without their ending."""

    size: int = 16
    fonts: tuple[str, ...] = FONTS

    name: ClassVar[str] = "glyphs"

    def __post_init__(self):
        config.check(self, size=(4, 512))

    def images(self) -> np.ndarray:
        """Every glyph of the fonts that leaves a mark."""
        return _images(self)


@functools.lru_cache(2)
def _images(glyphs: Glyphs) -> np.ndarray:
    import matplotlib
    from matplotlib.ft2font import FT2Font

    out = []
    for name in glyphs.fonts:
        path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        if not path.is_file():
            raise AtomError(f"fonts: matplotlib has no {name}")
        font = ImageFont.truetype(str(path), round(0.8 * glyphs.size), layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(FT2Font(str(path)).get_charmap()):
            image = Image.new("L", (glyphs.size, glyphs.size))
            centre = (glyphs.size / 2, glyphs.size / 2)
            ImageDraw.Draw(image).text(centre, chr(code), fill=255, font=font, anchor="mm")
            pixels = np.asarray(image)
            if pixels.max() > 64:
                out.append(pixels)
    return np.stack(out)[..., None]
