"""Chains of one problem as a grid over their lengths and their number, from one run of the longest and the most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atom_jax.evaluation import cache
from atom_jax.inference.scaling import majority, peak
from atom_jax.session.queue import Made

NAMES = ("right", "any", "finished", "reads", "peak", "held")


def is_grid(value: Any, shape: tuple[int, int]) -> bool:
    """Whether something that was read has the form of what `grid` returns for so many lengths and widths."""
    return (
        isinstance(value, dict) and value.keys() == {*NAMES} and all(cache.numbers(x, shape) for x in value.values())
    )


def grid(
    chains: Sequence[Made],
    votes: Sequence[str | None],
    solves: Callable[[str], bool],
    lengths: Sequence[int],
    widths: Sequence[int],
) -> dict[str, list[list[Any]]]:
    """For every length L (of tokens chosen, a stop id included) and number of chains W, as if there were no more:

    right: whether the vote's answer is; any: whether one of the answers is; finished: chains that ended; reads:
    entries read by all chains; peak: most entries that they hold together, going in step; held: entries of the chains
    at their ends, averaged over them. [len(lengths)][len(widths)] each.
    """
    out: dict[str, list[list[Any]]] = {name: [] for name in NAMES}
    for length in lengths:
        steps = [min(len(one.held), length - 1) for one in chains]
        ended = [one.ended and len(one.ids) < length for one in chains]
        said = [vote if end else None for vote, end in zip(votes, ended)]
        held = [one.held[:n] for one, n in zip(chains, steps)]
        reads = np.cumsum([one.read[:n].astype(np.float64).sum() for one, n in zip(chains, steps)])
        last = np.cumsum([float(x[-1]) if len(x) else 0.0 for x in held])
        of = lambda fn: [fn(w) for w in widths]  # noqa: E731
        out["right"].append(of(lambda w: (a := majority(said[:w])) is not None and solves(a)))  # noqa: B023
        out["any"].append(of(lambda w: any(a is not None and solves(a) for a in said[:w])))  # noqa: B023
        out["finished"].append(of(lambda w: sum(ended[:w])))  # noqa: B023
        out["reads"].append(of(lambda w: round(float(reads[w - 1]), 1)))  # noqa: B023
        out["peak"].append(of(lambda w: round(peak(held[:w]), 1)))  # noqa: B023
        out["held"].append(of(lambda w: round(last[w - 1] / w, 1)))  # noqa: B023
    return out
