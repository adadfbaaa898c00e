"""A picture of what a model imagines: several futures below the real one, with the return that each promises."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from atom_jax import picture
from atom_jax.typing import AtomError

# Pixels of a frame in a GIF, about; and between frames. Seconds per frame.
_WIDE, _GAP, _SECONDS = 96, 8, 0.6
_MOST = 16  # futures, and steps of a strip


@dataclasses.dataclass(frozen=True)
class Imagination:
    """real: u8 [h, height, width, 3], what came, or None where nobody knows. futures: u8 [n, h, height, width, 3].
    values: f32 [n], the return that each promises. chosen: which of them is the plan, or None. actions: [n][h], the
    names of what is done before each frame, or None."""

    futures: np.ndarray
    values: np.ndarray
    real: np.ndarray | None = None
    chosen: int | None = None
    actions: list[list[str]] | None = None

    @property
    def rows(self) -> list[tuple[str, np.ndarray]]:
        """(what it is, frames [h, height, width, 3]): the real future, then those imagined."""
        top = [] if self.real is None else [("real", self.real)]
        return top + [(f"{value:.2f}", frames) for value, frames in zip(self.values, self.futures)]

    @property
    def framed(self) -> int | None:
        """Which of `rows` is the plan."""
        return None if self.chosen is None else self.chosen + (self.real is not None)


def draw(said: Imagination, path: str | os.PathLike) -> None:
    """Writes a GIF, which shows all futures next to each other as time goes on, or a PNG, which shows each as a line
    of frames. The plan is framed.

    Raises AtomError for another name, for more than 16 futures (or steps, of a PNG), and when the file cannot be
    written.
    """
    picture.check(path, moves=True)
    n, h = said.futures.shape[:2]
    moves = os.fspath(path).lower().endswith(".gif")
    if n > _MOST or (h > _MOST and not moves):
        raise AtomError(f"{path}: {n} futures of {h} steps; a picture shows {_MOST} futures, and a PNG {_MOST} steps")
    if moves:
        picture.animated(path, [_tiles(said, t) for t in range(h)], _SECONDS)
        return
    size = (0.8 * h + 1.4, 0.95 * len(said.rows) + 0.3)
    with picture.drawn(path, nrows=len(said.rows), figsize=size, squeeze=False) as (_, axes):
        for i, (ax, (label, frames)) in enumerate(zip(axes[:, 0], said.rows)):
            _line(ax, frames, label, i == said.framed)
            names = said.actions and i >= len(said.rows) - n and said.actions[i - len(said.rows) + n]
            for t, name in enumerate(names or ()):
                ax.text(t + 0.5, 1.0, name, fontsize=7, ha="center", va="bottom")


def _line(ax: Any, frames: np.ndarray, label: str, framed: bool) -> None:
    """One future from left to right, and what it promises."""
    from matplotlib.patches import Rectangle

    h = len(frames)
    for t, frame in enumerate(frames):
        ax.imshow(frame, extent=(t + 0.04, t + 0.96, 0.04, 0.96), interpolation="nearest", aspect="auto")
    ax.text(h + 0.1, 0.5, label, fontsize=9, va="center", weight="bold" if framed else "normal")
    if framed:
        ax.add_patch(Rectangle((0, 0), h, 1, fill=False, edgecolor="tab:red", linewidth=2.5))
    ax.set(xlim=(-0.05, h + 1.1), ylim=(-0.05, 1.25))
    ax.axis("off")


def _tiles(said: Imagination, t: int) -> np.ndarray:
    """Frame t of every future, u8 [height, width, 3], in rows of four."""
    from PIL import Image, ImageDraw

    rows = said.rows
    times = max(1, _WIDE // rows[0][1].shape[2])
    high, wide = (times * size for size in rows[0][1].shape[1:3])
    across = min(4, len(rows))
    down, text = -(-len(rows) // across), 14
    sheet = Image.new("RGB", (across * (wide + _GAP) + _GAP, down * (high + _GAP + text) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, frames) in enumerate(rows):
        x, y = _GAP + i % across * (wide + _GAP), _GAP + i // across * (high + _GAP + text)
        sheet.paste(Image.fromarray(frames[t].repeat(times, axis=0).repeat(times, axis=1)), (x, y))
        pen.text((x, y + high + 1), label, fill="black")
        if i == said.framed:
            pen.rectangle((x - 3, y - 3, x + wide + 2, y + high + 2), outline=(214, 39, 40), width=3)
    return np.asarray(sheet)
