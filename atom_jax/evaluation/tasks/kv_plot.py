"""The picture of a comparison of cache policies: quality over entries held."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax import picture

_LABELS = {
    "added": "added loss (nats per token)",
    "facts": "share of facts recalled",
    "needle": "share of needles found",
    "lambada": "share of last words right",
}
# Colours that stay apart for most colour-blind readers (Okabe and Ito, without yellow), then darker and lighter ones;
# those that are alike in tint have other shapes.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444", "#003F63", "#7A3600", "#005C43",
    "#7B3A5F", "#A9D8F2", "#F5CF80", "#999999", "#6A3D9A", "#B8E0A0",
)  # fmt: skip
_MARKERS = "osD^vPX"
# Points between the labels of two lines.
_APART = 10
# Nats below which the scale of added losses is linear.
_FLAT = 0.01


def draw(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG with one panel for every part and source among the rows of `kv_cells.rows`.

    Raises AtomError when the file cannot be written.
    """
    shown = [r for r in rows if r["part"] in _LABELS]
    panels = list(dict.fromkeys((r["part"], r["source"]) for r in shown))
    names = list(dict.fromkeys(r["policy"] for r in shown if r["policy"] != "none"))
    across = min(3, max(1, len(panels)))
    down = -(-max(1, len(panels)) // across)
    layout = {"nrows": down, "ncols": across, "figsize": (6.2 * across, 5.0 * down), "squeeze": False}
    with picture.drawn(path, dpi=130, **layout) as (figure, axes):
        for ax, (part, source) in zip(axes.flat, panels):
            held = [r for r in rows if r["policy"] == "none" and r["source"] == source]
            _panel(ax, part, source, [r for r in shown if (r["part"], r["source"]) == (part, source)], names, held)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        figure.canvas.draw()
        for ax in axes.flat[: len(panels)]:
            _label(ax)


def _panel(ax: Any, part: str, source: str, rows: list[dict], names: list[str], dense: list[dict]) -> None:
    """One line per method, from its smallest to its largest memory; the dense cache as a point on a dotted line."""
    for number, name in enumerate(names):
        mine = sorted((r for r in rows if r["policy"] == name), key=lambda r: r["held"])
        if mine:
            x, y = ([r[k] for r in mine] for k in ("held", "value"))
            color, marker = COLORS[number % len(COLORS)], _MARKERS[number // 7 % len(_MARKERS)]
            error = [r["stderr"] or 0.0 for r in mine]
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5, "elinewidth": 0.7}
            ax.errorbar(x, y, yerr=error, label=name, **style)
    if dense:
        level = 0.0 if part == "added" else next(r["value"] for r in dense if r["part"] == part)
        ax.axhline(level, color="grey", linestyle=":", linewidth=1)
        ax.plot([dense[0]["held"]], [level], color="grey", marker="*", markersize=9, linestyle="none", label="none")
    ax.set(xscale="log", xlabel="entries held after the context (mean of layers and heads)", ylabel=_LABELS[part])
    ax.set_title(source, fontsize=10)
    ax.grid(alpha=0.25, which="major")
    held = [r["held"] for r in [*rows, *dense]]
    if held:
        low, high = min(held), max(held)
        # Room for the labels on the left.
        ax.set_xlim(low / (high / low * 2) ** 0.45, high * 1.9)
        ticks = [t for t in 2.0 ** np.arange(0, 24) if low * 0.99 <= t <= high * 1.15]
        ax.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
        ax.set_xticks([], minor=True)
    values = [r["value"] for r in rows if r["policy"] != "none"]
    if part == "added" and values and max(values) > 20 * _FLAT:
        # Good methods stay apart next to bad ones; around 0 the scale is linear, for differences may be negative.
        ax.set_yscale("symlog", linthresh=_FLAT, linscale=0.4)
        ticks = [0, *(t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if t < 1.5 * max(values))]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_ylim(min(-_FLAT / 2, 1.2 * min(values)), 1.5 * max(values))


def _label(ax: Any) -> None:
    """Names the lines at their left ends, and single points on their right, one below the other where they would
    overlap."""
    left, right = [], []
    for drawn in [*ax.containers, *(line for line in ax.lines if line.get_label() == "none")]:
        line = drawn[0] if isinstance(drawn, tuple) else drawn
        x, y = (np.asarray(a, float) for a in (line.get_xdata(), line.get_ydata()))
        (left if len(x) > 1 else right).append((drawn.get_label(), line.get_color(), float(x[0]), float(y[0])))
    for ends, shift, align in ((left, -9, "right"), (right, 9, "left")):
        _names(ax, ends, shift, align)


def _names(ax: Any, ends: list[tuple[str, str, float, float]], shift: int, align: str) -> None:
    """Labels (name, colour, x, y), `shift` points beside their places."""
    scale = ax.figure.dpi / 72
    ends = sorted(ends, key=lambda e: ax.transData.transform(e[2:])[1])
    heights = [ax.transData.transform(e[2:])[1] / scale for e in ends]
    places = list(heights)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + _APART)
    # What was pushed above the frame comes down again.
    top = ax.bbox.y1 / scale - 5
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - _APART
    for (name, color, x, y), height, place in zip(ends, heights, places):
        away = shift * (1 if abs(place - height) < _APART / 2 else 2)
        ax.annotate(
            name, (x, y), xytext=(away, place - height), textcoords="offset points", color=color, fontsize=8,
            ha=align, va="center", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )  # fmt: skip
