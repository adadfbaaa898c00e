"""Images that lie in a file."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import zipfile
import zlib

import numpy as np

from atom_jax.data.images.picture import Pictures
from atom_jax.files import read_regular
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class File(Pictures):
    """An .npz file whose array "images" is u8 [n, size, size, channels], with 1 or 3 channels."""

    path: str = ""

    @property
    def name(self) -> str:
        """The path."""
        return self.path

    @property
    def size(self) -> int:
        """Pixels along a side."""
        return self.images().shape[1]

    @property
    def channels(self) -> int:
        """1 for gray, 3 for colours."""
        return self.images().shape[3]

    def images(self) -> np.ndarray:
        """What the file holds. Raises AtomError where it is none of this form."""
        return _read(self.path)


@functools.lru_cache(2)
def _read(path: str | os.PathLike) -> np.ndarray:
    try:
        with np.load(io.BytesIO(read_regular(path)), allow_pickle=False) as found:
            images = found["images"]
    except FileNotFoundError:
        raise AtomError(f"image:{path}: no such file") from None
    except KeyError:
        raise AtomError(f"image:{path}: there is no array 'images' in it") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise AtomError(f"image:{path}: not an .npz file that can be read") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise AtomError(
            f"image:{path}: images is {images.dtype}{list(images.shape)}; expected uint8[n, size, size, c]"
        )
    if images.shape[1] != images.shape[2]:
        raise AtomError(f"image:{path}: images are {images.shape[1]} x {images.shape[2]}; expected square ones")
    return images
