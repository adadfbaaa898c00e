"""The picture of a comparison of lasting memories: recall over age, and entries over tokens."""

from __future__ import annotations

import os
from typing import Any

from atom_jax import picture
from atom_jax.evaluation.tasks import lasting_table
from atom_jax.evaluation.tasks.kv_plot import COLORS
from atom_jax.kvcache.lasting.levels import Law, lines

_MARKERS = "osD^vPX"


def draw(rows: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG: the share of answers' tokens that are right over the age of facts, a line for every method; and
    entries per head over the tokens that have left the window, by the law as a line and as they were met as points,
    next to a memory that keeps every token. Raises AtomError when the file cannot be written."""
    methods = lasting_table.methods(rows)
    style = {
        method: {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i // 7 % len(_MARKERS)], "markersize": 4}
        for i, method in enumerate(methods)
    }
    with picture.drawn(path, dpi=130, ncols=2, figsize=(14.0, 5.5)) as (_, (left, right)):
        found = lasting_table.ages(rows)
        for method in methods:
            mine = [r for r in found if (r["law"], r["score"]) == method]
            label = " ".join(filter(None, method))
            left.plot([r["age"] for r in mine], [r["right"] for r in mine], label=label, **style[method])
        left.set_xscale("log", base=2)
        left.set(xlabel="tokens since the fact was read (means of bins)", ylim=(0, 1))
        left.set_ylabel("share of the answer's tokens that are the likeliest")
        left.grid(alpha=0.25)
        left.legend(fontsize=8)
        _growth(right, rows, style)


def _growth(ax: Any, rows: list[dict[str, Any]], style: dict[tuple[str, str], dict]) -> None:
    # Entries are the same for all scores of a law.
    longest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "" and row["growth"]:
            known = longest.setdefault(row["kept_by"], row)
            if row["growth"][-1][0] > known["growth"][-1][0]:
                longest[row["kept_by"]] = row
    most = max((row["growth"][-1][0] for row in longest.values()), default=1)
    ax.plot([0, most], [0, most], color="#999999", linestyle="--", label="every token")
    for law, row in longest.items():
        look = style[row["law"], row["score"]]
        ax.plot(*lines(Law.parse(law), row["growth"][-1][0]), color=look["color"], linewidth=1, label=law)
        ax.plot(*zip(*row["growth"]), linestyle="none", **look)
    ax.set(xlabel="tokens that have left the window", ylabel="entries per key/value head", xlim=(0, None))
    ax.set_yscale("symlog", linthresh=128)
    ax.set_ylim(0, None)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="lower right")
