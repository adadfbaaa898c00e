"""Results with standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Metric(NamedTuple):
    """A number and its standard error, in the same unit. nan where one observation gives no error."""

    value: float
    stderr: float


@dataclasses.dataclass(frozen=True)
class Result:
    """metrics: by name; count: documents, or windows for `bpb`; notes: whatever else is worth keeping in the JSON;
    table: what to print instead of the metrics, where they are no short list."""

    metrics: dict[str, Metric]
    count: int
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    table: str = ""


def proportion(hits: Sequence[bool]) -> Metric:
    """Share p of hits, with the standard error sqrt(p (1 - p) / n)."""
    p = float(np.mean(hits))
    return Metric(p, math.sqrt(p * (1 - p) / len(hits)))


def mean(values: Sequence[float]) -> Metric:
    """Mean, with the sample standard deviation over sqrt(n)."""
    return Metric(float(np.mean(values)), _sd(np.asarray(values)) / math.sqrt(len(values)))


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Metric:
    """sum(tops) / sum(bottoms) over n independent pairs, with the usual linearised standard error of a ratio."""
    top, bottom = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    value = top.sum() / bottom.sum()
    return Metric(float(value), _sd(top - value * bottom) * math.sqrt(len(top)) / float(bottom.sum()))


def perplexity(nats: Sequence[float]) -> Metric:
    """exp of the mean, with the standard error of the mean carried over linearly."""
    m = mean(nats)
    return Metric(math.exp(m.value), math.exp(m.value) * m.stderr)


def _sd(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def columns(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells as lines of text: the first `left` columns begin, the others end below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = (cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
