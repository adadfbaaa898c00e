"""Pictures as PNG files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from atom_jax.typing import AtomError


def check_name(path: str | os.PathLike) -> None:
    """Raises AtomError unless the name ends in .png."""
    if not os.fspath(path).lower().endswith(".png"):
        raise AtomError(f"{path}: the picture is a PNG file, so its name must end in .png")


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
        figure.savefig(path, dpi=dpi)
    except OSError as e:
        raise AtomError(f"{path}: the picture cannot be written ({e.strerror})") from None
    finally:
        plt.close(figure)
