"""What the benchmark of world models aims at, and whether its results reach that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Rounding of shares of episodes.
NEAR = 1e-6


class Results:
    """Means over seeds. All methods raise LookupError for what was not measured."""

    def __init__(self, found: dict[str, Any]):
        self.found = found

    def mean(self, name: str, length: int, column: str) -> float:
        """A figure of a variant after watches of so many frames."""
        return float(np.mean([rows[self._index(length)][column] for rows in self.found["rows"][name]]))

    def ahead(self, name: str, length: int) -> float:
        """How much more often `watch` succeeds."""
        return self.mean("watch", length, "success") - self.mean(name, length, "success")

    def share(self, name: str, length: int, column: str) -> float:
        """A figure of `watch` as a share of another variant's."""
        return self.mean("watch", length, column) / self.mean(name, length, column)

    def steps(self, name: str, length: int) -> float:
        """Steps of the main network per decision, the watch included."""
        inside = sum(self.mean(name, length, f"main_steps_{part}") for part in ("decision", "imagined"))
        return self.mean(name, length, "main_steps_watch") + self.mean(name, length, "futures") * inside

    def rival(self, length: int) -> str:
        """The cache of `watch_every` that holds as many entries as `watch` has units and succeeds most often."""
        names = [name for name in self.found["rows"] if name.startswith("watch_every, ")]
        if not names:
            raise LookupError("no cache of so few entries")
        return max(names, key=lambda name: self.mean(name, length, "success"))

    def knows(self, name: str) -> float:
        """Share of validation frames at which a variant knows what is hidden, of its worst seed."""
        if not (known := self.found["secret_right"].get(name)):
            raise LookupError(f"what {name} knows")
        return min(known)

    def _index(self, length: int) -> int:
        if length not in self.found["lengths"]:
            raise LookupError(f"watches of {length} frames")
        return self.found["lengths"].index(length)


class Target(NamedTuple):
    """value: of the results, which `most` is the upper limit of, or `least` the lower one; limits may be found in the
    results, too."""

    text: str
    value: Callable[[Results], float]
    most: float | Callable[[Results], float] | None = None
    least: float | None = None


def _steps_aimed_at(r: Results) -> float:
    """4.3 steps for the watch and none for futures, of 40 and 5 with a unit for every frame."""
    return 4.3 / (40 + 5 * r.mean("watch", 40, "futures"))


TARGETS = (
    Target(
        "40 frames: success below the ceiling",
        lambda r: r.mean("watch", 40, "ceiling") - r.mean("watch", 40, "success"), most=0.10,
    ),
    Target(
        "40 frames: success below the simulator's, with the same candidates",
        lambda r: r.mean("watch", 40, "simulator") - r.mean("watch", 40, "success"), most=0.10,
    ),
    Target("40 frames: main steps per frame", lambda r: r.mean("watch", 40, "main_steps_watch") / 40, most=1 / 6),
    Target(
        "40 frames: main steps per imagined future, after its first step",
        lambda r: r.mean("watch", 40, "main_steps_imagined"), most=0.1,
    ),
    Target(
        "40 frames: entries, as a share of every frame's", lambda r: r.share("watch_every", 40, "units"), most=1 / 6
    ),
    Target(
        "160 frames: success below that after 40",
        lambda r: r.mean("watch", 40, "success") - r.mean("watch", 160, "success"), most=0.10,
    ),
    Target(
        "160 frames: units, as a multiple of those of 40",
        lambda r: r.mean("watch", 160, "main_steps_watch") / r.mean("watch", 40, "main_steps_watch"), most=1.3,
    ),
    Target("every frame a unit: knows what is hidden", lambda r: r.knows("watch_every"), least=0.95),
    Target("40 frames: success below every frame's", lambda r: -r.ahead("watch_every", 40), most=0.05),
    Target("160 frames: success below every frame's", lambda r: -r.ahead("watch_every", 160), most=0.0),
    Target("40 frames: success above fixed units'", lambda r: r.ahead("watch_fixed", 40), least=0.15),
    Target("160 frames: success above fixed units'", lambda r: r.ahead("watch_fixed", 160), least=0.15),
    # What a prototype without a curriculum had.
    Target("40 frames: success far above fixed units'", lambda r: r.ahead("watch_fixed", 40), least=0.4),
    Target("160 frames: success far above fixed units'", lambda r: r.ahead("watch_fixed", 160), least=0.4),
    Target("40 frames: success below the best cache's", lambda r: -r.ahead(r.rival(40), 40), most=0.0),
    Target("160 frames: success below the best cache's", lambda r: -r.ahead(r.rival(160), 160), most=0.0),
    Target(
        "40 frames: main steps of the watch, as a share of the best cache's",
        lambda r: r.share(r.rival(40), 40, "main_steps_watch"), most=1 / 6,
    ),
    Target(
        "40 frames: main steps of a decision, as a share of the best cache's",
        lambda r: r.steps("watch", 40) / r.steps(r.rival(40), 40), most=1 / 6,
    ),
    Target("40 frames: units, as a share of changes", lambda r: r.share("watch_change", 40, "units"), most=1 / 6),
    Target(
        "40 frames: operations of a decision, as a share of every frame's",
        lambda r: r.share("watch_every", 40, "mflop"), most=_steps_aimed_at,
    ),
    Target(
        "memory of one more future after 160 frames, as a multiple of that after 40",
        lambda r: r.mean("watch", 160, "bytes_future") / r.mean("watch", 40, "bytes_future"), most=1.0,
    ),
)  # fmt: skip


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of every target: its text, most or least (the limit), value and holds, both None where something
    that it asks about was not measured."""
    results, out = Results(found), []
    for target in TARGETS:
        row: dict[str, Any] = {"target": target.text, "value": None, "holds": None}
        kind, limit = ("most", target.most) if target.least is None else ("least", target.least)
        try:
            limit = limit(results) if callable(limit) else limit
            value = row["value"] = target.value(results)
            row["holds"] = bool(value <= limit + NEAR if kind == "most" else value >= limit - NEAR)
        except LookupError:
            limit = None if callable(limit) else limit
        out.append(row | {kind: limit})
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """The targets in Markdown."""
    lines = ["Targets:", "", "| target | at most | at least | measured | |", "|---|---|---|---|---|"]
    say = lambda x: "" if x is None else f"{round(x, 3) + 0.0:.3f}"  # noqa: E731
    for row in rows:
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[row["holds"]]
        cells = row["target"], say(row.get("most")), say(row.get("least")), say(row["value"]), verdict
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
