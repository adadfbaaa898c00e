"""What the benchmark of world models compares, and its results as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax.evaluation.reports import plan_picture
from atom_jax.evaluation.reports.plan_picture import Point
from atom_jax.evaluation.tasks.plan import interval
from atom_jax.typing import AtomError

KNOWN = ("watch", "watch_every", "watch_fixed", "watch_cosine", "watch_change", "watch_local")


def variants(names: Sequence[str]) -> list[str]:
    """Each once, and `watch` before `watch_every`, whose caches hold as many entries as that has units. Raises
    AtomError for an unknown one, and for none."""
    if unknown := [name for name in names or [""] if name not in KNOWN]:
        raise AtomError(f"--variants: {unknown[0]!r} is none of {', '.join(KNOWN)}")
    return sorted(set(names), key=KNOWN.index)


COLUMNS = {
    "success": lambda rows: f"{mean(rows, 'success'):.3f} ({' '.join(each(rows, 'success'))})",
    "wrong": lambda rows: f"{mean(rows, 'wrong'):.3f}",
    "watch": lambda rows: f"{mean(rows, 'main_steps_watch'):.1f}",
    "first": lambda rows: f"{mean(rows, 'main_steps_decision'):.2f}",
    "future": lambda rows: f"{mean(rows, 'main_steps_imagined'):.2f}",
    "entries": lambda rows: f"{mean(rows, 'units'):.1f}",
    "kB": lambda rows: f"{mean(rows, 'bytes') / 1e3:.0f} + {mean(rows, 'bytes_future') / 1e3:.1f}",
    "Mflop": lambda rows: f"{mean(rows, 'mflop'):.0f}",
    "seconds": lambda rows: f"{mean(rows, 'seconds'):.1f}",
}


def each(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Of every seed."""
    return [f"{row[name]:.3f}" for row in rows]


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Over seeds."""
    return float(np.mean([row[name] for row in rows]))


def table(found: dict[str, Any]) -> str:
    """The results in Markdown, a part for each length."""
    parts, every = [], found["rows"].get("watch_every")
    for i, length in enumerate(found["lengths"]):
        any_rows = [rows[i] for rows in next(iter(found["rows"].values()))]
        known = ", ".join(f"{name} {mean(any_rows, name):.3f}" for name in ("ceiling", "simulator", "random"))
        lines = [f"Watches of {length} frames; {known}:", "", f"| variant | {' | '.join(COLUMNS)} | train |"]
        lines.append("|---" * (len(COLUMNS) + 2) + "|")
        for name, seeds in found["rows"].items():
            cells = {column: cell([rows[i] for rows in seeds]) for column, cell in COLUMNS.items()}
            if every is not None:
                share = mean([rows[i] for rows in seeds], "units") / mean([rows[i] for rows in every], "units")
                cells["entries"] += f" ({share:.2f})"
            took = [s for s in found["train_seconds"].get(name, []) if s is not None]
            cells["train"] = f"{np.mean(took):.0f}" if took else ""
            lines.append(f"| {name} | {' | '.join(cells.values())} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(found: dict[str, Any], path: str) -> None:
    """Success over the main network's steps per decision: those of the watch, and of all imagined futures."""
    panels = {}
    for i, length in enumerate(found["lengths"]):
        points = []
        for name, seeds in found["rows"].items():
            rows = [row[i] for row in seeds]
            success, n = mean(rows, "success"), found["episodes"] * len(rows)
            inside = mean(rows, "main_steps_decision") + mean(rows, "main_steps_imagined")
            steps = mean(rows, "main_steps_watch") + mean(rows, "futures") * inside
            points.append(Point(name.removeprefix("watch_"), steps, success, *interval(success, n)))
        first = [row[i] for row in next(iter(found["rows"].values()))]
        points += [Point(name, None, mean(first, name), 0.0, 0.0) for name in ("ceiling", "simulator", "random")]
        panels[f"watches of {length} frames"] = points
    plan_picture.draw(panels, path)
