"""Pictures as PNG files, and moving ones as GIF."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax.files import check_output, replaced
from atom_jax.typing import AtomError


def check(path: str | os.PathLike | None, moves: bool = False) -> None:
    """Raises AtomError unless the name ends in .png, or in .gif where the picture may move, and a file can be written
    there; None: there is to be no picture."""
    if path is None:
        return
    if not os.fspath(path).lower().endswith((".png", ".gif") if moves else ".png"):
        kind, end = ("PNG or GIF", ".png or .gif") if moves else ("PNG", ".png")
        raise AtomError(f"{path}: the picture is a {kind} file, so its name must end in {end}")
    try:
        check_output(path)
    except OSError as e:
        raise AtomError(f"{path}: the picture cannot be written ({e.strerror})") from None


@contextlib.contextmanager
def drawn(path: str | os.PathLike, dpi: int = 120, **layout: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, which are written when the block ends. layout: as of matplotlib's `subplots`.

    Raises AtomError when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(layout="constrained", **layout)
    try:
        yield figure, axes
        with replaced(path) as part:
            figure.savefig(part, dpi=dpi, format="png")
    except OSError as e:
        raise AtomError(f"{path}: the picture cannot be written ({e.strerror})") from None
    finally:
        plt.close(figure)


def animated(path: str | os.PathLike, pictures: Sequence[np.ndarray], seconds: float) -> None:
    """Writes pictures, u8 [height, width, 3], as a GIF that shows each for so many seconds and begins anew.

    Raises AtomError when the file cannot be written.
    """
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in pictures)
    try:
        with replaced(path) as part:
            first.save(part, "GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
    except OSError as e:
        raise AtomError(f"{path}: the picture cannot be written ({e.strerror})") from None
