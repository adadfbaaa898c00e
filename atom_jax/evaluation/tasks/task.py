"""What a task is: a record with a name for its request files, default `settings`, and `plan`.

`plan` turns settings into items to score, and a function from all their scores to a Result. A task that needs more
than log-likelihoods has `run` instead, and does everything itself.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from atom_jax.evaluation.encode import Encoder, Item
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.metrics import Result
from atom_jax.typing import LM


class Plan(NamedTuple):
    """items to score, and what to make of their scores (in the order of the items)."""

    items: list[Item]
    summarize: Callable[[Sequence[Score]], Result]


class Task(Protocol):
    """settings: a frozen dataclass, the values that --set TASK.FIELD=VALUE changes."""

    settings: Any

    def plan(self, settings: Any, encoder: Encoder) -> Plan:
        """The items of this task for a model with this encoder. Raises AtomError for missing or unexpected data."""
        ...


@runtime_checkable
class Runner(Protocol):
    """A task that runs itself. settings: as of a Task. One for models that read no texts names what they read as
    `reads`, and gets no encoder."""

    settings: Any

    def run(self, lm: LM, settings: Any, encoder: Encoder, out: pathlib.Path | None) -> Result:
        """The result. out: the file of the whole evaluation's results, beside which this task may keep others of its
        own; None: it keeps nothing. Raises AtomError for missing or unexpected data and bad settings."""
        ...


class Scored(NamedTuple):
    """Where a continuation went: its items (more than one if it was too long for one window) and its UTF-8 bytes."""

    items: range
    nbytes: int


class Planner:
    """Collects the items of a task. cut: how many contexts lost their beginning."""

    def __init__(self):
        self.items: list[Item] = []
        self.cut = 0

    def pair(self, encoder: Encoder, context: str, continuation: str) -> Scored:
        """Adds a continuation after a context."""
        piece = encoder.pair(context, continuation)
        first = len(self.items)
        self.items.extend(piece.items)
        self.cut += piece.cut
        return Scored(range(first, len(self.items)), piece.nbytes)


def logprob(scores: Sequence[Score], scored: Scored) -> float:
    """Log-probability of a continuation in nats."""
    return sum(scores[i].logprob for i in scored.items)


def greedy(scores: Sequence[Score], scored: Scored) -> bool:
    """Whether greedy decoding would write exactly this continuation."""
    return all(scores[i].greedy for i in scored.items)
