"""A picture of what planning brings, over what it costs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from atom_jax.evaluation import picture
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
    picture.check_name(path)
    names = list(dict.fromkeys(p.name for points in panels.values() for p in points if p.main_steps is not None))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    layout = {"ncols": len(panels), "figsize": (5.5 * len(panels), 4.5), "sharey": True, "squeeze": False}
    with picture.drawn(path, dpi=130, **layout) as (_, axes):
        for ax, (title, points) in zip(axes[0], panels.items()):
            _panel(ax, points, color)
            ax.set_title(title, fontsize=10)
        axes[0, 0].set_ylabel("share of episodes that end at the goal")


def _panel(ax: Any, points: list[Point], color: dict[str, Any]) -> None:
    most = 1.0
    for point in points:
        if point.main_steps is None:
            ax.axhline(point.success, color="grey", linewidth=1, linestyle="--")
            place = {"ha": "right", "va": "bottom", "transform": ax.get_yaxis_transform()}
            ax.text(0.99, point.success, point.name, fontsize=8, color="grey", **place)
            continue
        most = max(most, point.main_steps)
        error = [[max(0.0, point.success - point.low)], [max(0.0, point.high - point.success)]]
        ax.errorbar(point.main_steps, point.success, yerr=error, fmt="o", capsize=2, color=color[point.name])
        ax.annotate(
            point.name, (point.main_steps, point.success), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter("{x:g}")
    # Room on the right for the names.
    ax.set(xlabel="steps of the main network per decision", xlim=(-0.2, 5 * most), ylim=(0, 1.02))
    ax.grid(alpha=0.25)
