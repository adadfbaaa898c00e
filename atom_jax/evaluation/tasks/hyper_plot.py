"""The picture of hyper-scaling: accuracy over what it costs."""

from __future__ import annotations

import os
from typing import Any

from atom_jax import picture
from atom_jax.evaluation.tasks.kv_plot import COLORS

_LABELS = {"reads": "entries read per problem", "peak": "entries held together per problem"}


def draw(rows: list[dict[str, Any]], fronts: dict[str, dict[str, list[dict]]], path: str | os.PathLike) -> None:
    """Writes a PNG with a panel for each cost: fronts as steps, all cells of the grid as small points.

    Raises AtomError when the file cannot be written.
    """
    others = [name for name in fronts if name != "none"]
    colors = {"none": "black"} | {name: COLORS[i % len(COLORS)] for i, name in enumerate(others)}
    with picture.drawn(path, dpi=130, ncols=2, figsize=(12.0, 5.0), sharey=True) as (_, axes):
        for ax, (cost, label) in zip(axes, _LABELS.items()):
            for name, color in colors.items():
                mine = [row for row in rows if row["policy"] == name]
                ax.plot(
                    [r[cost] for r in mine], [r["accuracy"] for r in mine], ".", color=color, alpha=0.3, markersize=4
                )
                best = fronts[name][cost]
                x, y = [r[cost] for r in best], [r["accuracy"] for r in best]
                label_of = "everything kept" if name == "none" else name
                ax.step(x, y, where="post", color=color, linewidth=1.8, label=label_of)
                ax.plot(x, y, "o", color=color, markersize=4)
            ax.set_xscale("log", base=2)
            ax.set(xlabel=label, ylim=(0, 1))
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("share of problems right")
        axes[0].legend(loc="upper left", fontsize=9)
