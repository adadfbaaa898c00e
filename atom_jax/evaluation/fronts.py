"""What accuracy costs: fronts of configurations, and gaps between them with paired bootstrap intervals.

After Lancucki et al. (2025), who compare cache policies by the accuracy that is reached at equal cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Points(NamedTuple):
    """Configurations of one policy, m of them, on the same n problems: right f64 [m, n], cost f64 [m, n]."""

    right: np.ndarray
    cost: np.ndarray


class Gap(NamedTuple):
    """By how much one front is higher than another, averaged over log2 of the cost where both exist: of fronts as
    steps (what is reachable at no more than a cost), with the bounds of its 95% interval; linear: of fronts with
    straight lines between their points."""

    value: float
    low: float
    high: float
    linear: float


def front(accuracy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point beats at no greater cost, by rising cost."""
    order = np.lexsort((-accuracy, cost))
    best = np.maximum.accumulate(accuracy[order])
    return order[np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)]


def area(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], linear: bool = False) -> float:
    """Mean difference of two fronts, (accuracy, cost) each by rising cost, over log2 of the cost that both reach; nan
    where there is none."""
    xs = [np.log2(cost) for _, cost in (a, b)]
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    if not low < high:
        return float("nan")
    grid = np.unique(np.clip(np.concatenate([*xs, [low, high]]), low, high))
    if linear:
        first, second = (np.interp(grid, x, acc) for x, (acc, _) in zip(xs, (a, b)))
        return float(np.trapezoid(first - second, grid) / (high - low))
    first, second = (acc[np.searchsorted(x, grid[:-1], side="right") - 1] for x, (acc, _) in zip(xs, (a, b)))
    return float(np.sum((first - second) * np.diff(grid)) / (high - low))


def gap(policy: Points, base: Points, draws: int = 1000, seed: int = 0) -> Gap:
    """Of a policy's front over that of `base`, on the same problems. The interval is a bootstrap over problems, with
    the same problems for both, whose fronts are chosen anew in each draw."""
    n = policy.right.shape[1]
    rng = np.random.default_rng(seed)
    weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), draws)]) / n
    means = [[weights @ x.T for x in (points.right, points.cost)] for points in (policy, base)]

    def of(i: int, linear: bool = False) -> float:
        chosen = []
        for accuracy, cost in means:
            index = front(accuracy[i], cost[i])
            chosen.append((accuracy[i][index], cost[i][index]))
        return area(*chosen, linear)

    found = np.array([of(i) for i in range(1, draws + 1)])
    bounds = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
    return Gap(of(0), float(bounds[0]), float(bounds[1]), of(0, linear=True))
