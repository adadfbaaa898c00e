"""The table: one line per row, printed as soon as it is measured, and the same numbers as JSON."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.compare import Figures, spread
from benchmarks.rows import Row

WIDTHS = (40, 9, 16, 16, 19, 36)


def heading(titles: tuple[str, str]) -> str:
    """The first two lines of the table; titles: what the two sides are called."""
    line = _line("", "", *titles, "ratio (>1: ours)", "bound: ours, peer")
    return f"{line}\n{'-' * len(line)}"


def line(row: Row, figures: Figures, machine: dict[str, float]) -> str:
    """Medians with half the range of the repeats, the ratio with its range over the pairs, and the bound's share."""
    result = summary(row, figures, machine)
    low, high = min(result["ratios"]), max(result["ratios"])
    ratio = f"{result['ratio']:.2f}" + (f" ({low:.2f}-{high:.2f})" if len(figures.ours) > 1 else "")
    bound = ""
    if "share" in result:
        values = [_times(s) if figures.bound == "weights" else f"{s:.0%}" for s in result["share"]]
        bound = f"{figures.bound} {', '.join(values)}"
    last = "; ".join(s for s in (bound, f"peer: {figures.setting}" if figures.setting else "") if s)
    return _line(row.label, row.unit, _figure(figures.ours), _figure(figures.peer), ratio, last)


def summary(row: Row, figures: Figures, machine: dict[str, float]) -> dict[str, Any]:
    """The row as JSON. machine: the rates "matmul" (GFLOP/s) and "read" (GB/s), as far as they are known.

    ratio: of the medians, larger than 1 where ours is better. share: of the bound that ours and the peer reach.
    """
    ours, peer = statistics.median(figures.ours), statistics.median(figures.peer)
    ratios = [b / a if row.less else a / b for a, b in zip(figures.ours, figures.peer)]
    out = {
        "name": row.name, "what": row.label, "unit": row.unit, "ours": ours, "peer": peer,
        "ratio": peer / ours if row.less else ours / peer, "ratios": ratios,
        "samples": {"ours": figures.ours, "peer": figures.peer}, "peer_setting": figures.setting,
    }  # fmt: skip
    if figures.bound == "weights":
        out |= {"bound": "weights", "share": [ours / figures.per_unit, peer / figures.per_unit]}
    elif figures.bound in machine:
        limit = machine[figures.bound]
        out |= {"bound": figures.bound, "share": [v * figures.per_unit / limit for v in (ours, peer)]}
    return out


def _line(label: str, unit: str, *cells: str) -> str:
    out = f"{label:<{WIDTHS[0]}}{unit:<{WIDTHS[1]}}"
    return (out + "".join(f"  {c:>{w}}" for c, w in zip(cells[:3], WIDTHS[2:])) + f"  {cells[3]}").rstrip()


def _figure(values: list[float]) -> str:
    middle = statistics.median(values)
    text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
    return text if len(values) == 1 else f"{text} ±{spread(values):.0%}"


def _times(share: float) -> str:
    return f"{share:.1f}x"
