"""A picture of what planning brings, over what it costs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from atom_jax import picture
from atom_jax.evaluation.tasks.kv_plot import COLORS


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant, or a variant with a policy. main_steps: of the main network per decision, the watch included; None
    for what has no network (the simulator, chance), which is a line. success: share of episodes; low, high: its
    interval."""

    name: str
    main_steps: float | None
    success: float
    low: float
    high: float


def draw(panels: dict[str, list[Point]], path: str | os.PathLike) -> None:
    """Writes a PNG: a panel for each title, with the success of each point over its steps of the main network, on a
    logarithmic axis that also has 0. The same name has one colour everywhere.

    Raises AtomError for a name that does not end in .png, and when the file cannot be written.
    """
    picture.check(path)
    names = list(dict.fromkeys(p.name for points in panels.values() for p in points if p.main_steps is not None))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    layout = {"ncols": len(panels), "figsize": (5.5 * len(panels), 4.5), "sharey": True, "squeeze": False}
    with picture.drawn(path, dpi=130, **layout) as (_, axes):
        for ax, (title, points) in zip(axes[0], panels.items()):
            _panel(ax, points, color)
            ax.set_title(title, fontsize=10)
        axes[0, 0].set_ylabel("share of episodes that end at the goal")


def _panel(ax: Any, points: list[Point], color: dict[str, Any]) -> None:
    lines: dict[float, list[str]] = {}
    for point in points:
        if point.main_steps is None:
            lines.setdefault(round(point.success, 2), []).append(point.name)
            ax.axhline(point.success, color="grey", linewidth=1, linestyle="--")
            continue
        error = [[max(0.0, point.success - point.low)], [max(0.0, point.high - point.success)]]
        ax.errorbar(point.main_steps, point.success, yerr=error, fmt="o", capsize=2, color=color[point.name])
    for success, names in lines.items():
        place = {"ha": "left", "va": "bottom", "transform": ax.get_yaxis_transform()}
        ax.text(0.01, success, ", ".join(names), fontsize=8, color="grey", **place)
    found = [point for point in points if point.main_steps is not None]
    for point, y in zip(found, _apart(found)):
        # Beside the point: on the left of those that took many steps.
        many = point.main_steps > 30
        x = point.main_steps / 1.25 if many else point.main_steps * 1.2 + 0.08
        place = {"ha": "right" if many else "left", "va": "center"}
        ax.text(x, y, point.name, fontsize=8, color=color[point.name], **place)
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter("{x:g}")
    most = max((point.main_steps for point in found), default=1.0)
    ax.set(xlabel="steps of the main network per decision", xlim=(-0.2, 2 * max(most, 1.0)), ylim=(0, 1.02))
    ax.grid(alpha=0.25)


def _apart(points: list[Point], gap: float = 0.035) -> list[float]:
    """Heights of the names of points, so that those of points at nearly the same place don't cover each other."""
    heights = [point.success for point in points]
    groups: list[list[int]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i].main_steps):
        near = groups and points[i].main_steps < 2 * points[groups[-1][-1]].main_steps + 0.5
        groups[-1].append(i) if near else groups.append([i])
    for group in groups:
        top = 1.0 + gap
        for i in sorted(group, key=lambda i: -points[i].success):
            top = heights[i] = min(heights[i], top - gap)
    return heights
