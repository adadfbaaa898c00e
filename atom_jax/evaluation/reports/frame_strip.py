"""A picture of where a model's units begin in a stream of frames, and how much each frame surprised it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from atom_jax import picture

# Frames per line of the picture, and in all of it.
_LINE, _MOST = 27, 270
_UNITS = ("tab:blue", "tab:orange")


@dataclasses.dataclass(frozen=True)
class Strip:
    """frames: u8 [t, height, width, 3]. begins: bool [t], where a unit begins. surprise: f32 [t] in nats and
    `threshold`, above which one does; None where the rule is another one."""

    frames: np.ndarray
    begins: np.ndarray
    surprise: np.ndarray | None = None
    threshold: float | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The units as (first frame, frame after the last). What comes before the first mark is one too."""
        starts = sorted({0, *np.flatnonzero(self.begins).tolist()}) if len(self.begins) else []
        return list(zip(starts, [*starts[1:], len(self.begins)]))


def render(strip: Strip) -> str:
    """The units in lines of text: their frames, how many they are, and the surprise at the first of them."""
    rows = [("frames", "number", "surprise" if strip.surprise is not None else "")]
    for start, stop in strip.spans:
        said = "" if strip.surprise is None else f"{strip.surprise[start]:.2f}"
        rows.append((f"{start}-{stop - 1}", str(stop - start), said))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    mean = len(strip.begins) / max(1, len(strip.spans))
    return "\n".join([*lines, f"{len(strip.spans)} units of {len(strip.begins)} frames: {mean:.1f} frames per unit"])


def draw(strip: Strip, path: str | os.PathLike) -> None:
    """Writes a PNG: the frames, under them a bar for every unit, and the surprise at each frame with its threshold.
    Of long streams it shows the first 270 frames, and says so.

    Raises AtomError for a name that does not end in .png, and when the file cannot be written.
    """
    picture.check(path)
    n, total = min(len(strip.frames), _MOST), len(strip.frames)
    lines, two = -(-n // _LINE), strip.surprise is not None
    each = (1.0, 0.9) if two else (1.0,)
    size = (0.55 * min(n, _LINE) + 1.2, 0.75 * sum(each) * lines + 0.6)
    layout = {"nrows": lines * len(each), "figsize": size, "height_ratios": each * lines, "squeeze": False}
    with picture.drawn(path, **layout) as (figure, axes):
        for line in range(lines):
            start, stop = line * _LINE, min((line + 1) * _LINE, n)
            mine = axes[line * len(each) : (line + 1) * len(each), 0]
            _frames(mine[0], strip, start, stop, min(n, _LINE))
            if two:
                _surprise(mine[1], strip, start, stop, min(n, _LINE))
        shown = "" if n == total else f" (the first {n:,} of {total:,} frames)"
        figure.suptitle(f"{len(strip.spans)} units in {total:,} frames{shown}", fontsize=9)


def _frames(ax: Any, strip: Strip, start: int, stop: int, width: int) -> None:
    """Frames start..stop - 1, each 1 wide, and the bars of their units below them."""
    for t in range(start, stop):
        ax.imshow(strip.frames[t], extent=(t + 0.04, t + 0.96, 0.0, 0.92), interpolation="nearest", aspect="auto")
    for i, (first, end) in enumerate(strip.spans):
        left, right = max(first, start), min(end, stop)
        if left < right:
            # Only the ends of a unit are set off, not those of a line.
            left, right = left + 0.06 * (left == first), right - 0.06 * (right == end)
            ax.barh(-0.12, right - left, height=0.12, left=left, color=_UNITS[i % len(_UNITS)])
    ax.set(xlim=(start, start + width), ylim=(-0.22, 1.0))
    ax.axis("off")


def _surprise(ax: Any, strip: Strip, start: int, stop: int, width: int) -> None:
    """The surprise at frames start..stop - 1; all lines have one scale."""
    colors = np.where(strip.begins[start:stop], "tab:red", "lightgrey")
    ax.bar(np.arange(start, stop) + 0.5, strip.surprise[start:stop], width=0.8, color=colors)
    most = float(np.max(strip.surprise, initial=1e-6, where=np.isfinite(strip.surprise)))
    if strip.threshold is not None:
        ax.axhline(strip.threshold, color="black", linewidth=0.8, linestyle="--")
        most = max(most, strip.threshold)
    ax.set(xlim=(start, start + width), ylim=(0, 1.1 * most))
    ax.set_ylabel("nats", fontsize=7)
    ticks = np.arange(start, stop, 5)
    ax.set_xticks(ticks + 0.5, [str(t) for t in ticks], fontsize=7)
    ax.tick_params(axis="y", labelsize=7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
