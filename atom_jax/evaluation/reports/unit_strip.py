"""A picture of where a model's units begin: one bar per byte of the text."""

from __future__ import annotations

import os

import numpy as np

from atom_jax import picture
from atom_jax.evaluation.reports.units import Units, visible

# Bytes per line of the picture, and in all of it.
_LINE, _MOST = 75, 1500
_FILL, _MARK = ("tab:blue", "tab:orange", "tab:green"), "black"


def draw(units: Units, path: str | os.PathLike) -> None:
    """Writes a PNG: under the text's characters, for every stage, the probability that a unit begins at each byte
    (height of the bar), and black lines where one does. Of long texts it shows the first 1,500 bytes, and says so.

    Raises AtomError for a name that does not end in .png, and when the file cannot be written.
    """
    picture.check(path)
    n, stages = min(len(units.text), _MOST), len(units.stages)
    lines = -(-n // _LINE)
    size = (0.17 * min(n, _LINE) + 1.5, lines * (0.45 * stages + 0.35) + 0.6)
    with picture.drawn(path, nrows=lines, figsize=size, squeeze=False) as (figure, axes):
        labels, found = _labels(units.text[:n])
        for line, ax in enumerate(axes[:, 0]):
            _line(ax, units, line * _LINE, min((line + 1) * _LINE, n), labels, found)
        shown = "" if n == len(units.text) else f" (the first {n:,} of {len(units.text):,} bytes)"
        what = "a unit begins, and where one does" if units.learned else "a token begins"
        figure.suptitle(f"Probability that {what}{shown}", fontsize=9)


def _line(ax, units: Units, start: int, stop: int, labels: list[str], found: list[bool]) -> None:
    """Bytes start..stop - 1, each 1 wide; stage 0 at the bottom."""
    x = np.arange(start, stop)
    for s, stage in enumerate(units.stages):
        color = _FILL[s % len(_FILL)]
        ax.bar(x, 0.85 * stage.begins[start:stop], width=1, align="edge", bottom=s, color=color, alpha=0.6)
        edges = stage.spans[:, 0]
        edges = edges[(edges >= start) & (edges < stop)]
        ax.vlines(edges, s, s + 0.85, color=_MARK, linewidth=1.2)
        ax.axhline(s, color="grey", linewidth=0.5)
    # Lines of one picture have one scale.
    ax.set(xlim=(start, start + min(_LINE, len(labels))), ylim=(0, len(units.stages)))
    ax.set_xticks(x + 0.5, labels[start:stop], family="monospace", fontsize=8)
    for tick, whole in zip(ax.get_xticklabels(), found[start:stop]):
        if not whole:
            tick.set(fontsize=5, rotation=90)
    named = units.learned and len(units.stages) > 1
    ax.set_yticks(
        np.arange(len(units.stages)) + 0.4, [f"stage {s}" if named else "" for s in range(len(units.stages))]
    )
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def _labels(text: bytes) -> tuple[list[str], list[bool]]:
    """A label for every byte, and whether it is a character: the first byte of a character bears it; bytes of what
    the font does not have, or what cannot be seen, are numbers."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("monospace"))
    labels, found = [], []
    for c in text.decode("utf-8", "surrogateescape"):
        raw = c.encode("utf-8", "surrogateescape")
        shown = "·" if c == " " else visible(raw)
        if len(shown) == 1 and font.get_char_index(ord(shown)):
            labels += [shown] + [""] * (len(raw) - 1)
            found += [True] * len(raw)
        else:
            labels += [f"{b:02X}" for b in raw]
            found += [False] * len(raw)
    return labels, found
