"""What the evaluation of cache policies measures piece by piece, and how it becomes rows of a table."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from atom_jax.evaluation import cache
from atom_jax.evaluation.metrics import Metric, columns, mean, proportion
from atom_jax.inference import continuation
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.policy import fitted
from atom_jax.typing import LM, AtomError


class Ask(NamedTuple):
    """context, target: i32 ids, the target to be scored after the context. group: what belongs together, a document
    or a depth. start: where the context begins in its source, in tokens. question: i32, what is read between the two;
    asks in a row with the same context read it once. kind: of a fact."""

    context: np.ndarray
    target: np.ndarray
    group: int
    start: int = 0
    question: np.ndarray = np.zeros(0, np.int32)
    kind: str = ""

    @property
    def positions(self) -> int:
        """That it takes of the model."""
        return len(self.context) + len(self.question) + len(self.target)


class Method(NamedTuple):
    """A policy as the table names it, its budget (None: it has none of its own), and what `config.memory` becomes.
    lm: the model that has learned it; None: the one that is evaluated."""

    name: str
    budget: int | None
    memory: Any
    lm: LM | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method on one set of texts: part "loss", "needle", "facts" or "lambada" and a name for the texts."""

    method: Method
    part: str
    source: str
    asks: tuple[Ask, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(map(_tokens, _together(self.asks)))

    def key(self, model: str, batch: int) -> str:
        """16 hex digits: the asks themselves carry the data, the settings and the tokenizer."""
        digest = hashlib.sha256(f"{model} {self.method.memory!r} {self.part} {batch}\n".encode())
        for ask in self.asks:
            digest.update(b"%d %d %d " % (ask.group, len(ask.context), len(ask.target)))
            digest.update(np.concatenate([*ask[:2], ask.question]).astype("<i4").tobytes())
        return digest.hexdigest()[:16]


def measure(lm: LM, cell: Cell, batch: int, done: Callable[[int], Any]) -> dict[str, Any]:
    """Scores a cell: lists over its asks, in order.

    logprobs: nats of the whole target; sizes: its tokens; hits: whether each of them was the likeliest; held: entries
    after the context, and held_after after the target, averaged over layers and heads; held_max: the largest of any
    head; bytes: of one row's cache buffers. done: called with the number of tokens read.
    Raises AtomError when a log-probability is not finite.
    """
    lm = cell.method.lm or lm
    memory = fitted(cell.method.memory, lm.tokenizer, lm.config.memory)
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory=memory))
    found: dict[str, list] = {n: [None] * len(cell.asks) for n in ("logprobs", "hits", "held", "held_after")}
    most, nbytes = 0, []
    for length, rows in _batches(cell.asks, batch):
        asks = [cell.asks[i] for i in rows]
        scores, of = _score(lm, asks, batch, length)
        for r, i in enumerate(rows):
            n = slice(len(asks[r].question), len(asks[r].question) + len(asks[r].target))
            found["logprobs"][i] = float(scores.logprobs[r, n].astype(np.float64).sum())
            found["hits"][i] = bool(scores.hits[r, n].all())
            found["held"][i] = float(scores.held[:, of[r]].mean())
            found["held_after"][i] = float(scores.held_after[:, r].mean())
            most = max(most, int(scores.held[:, of[r]].max()))
            if not math.isfinite(found["logprobs"][i]):
                name = f"{cell.method.name} on {cell.source}"
                raise AtomError(f"kv: {name} gives item {i} a log-probability of {found['logprobs'][i]}")
        nbytes.append(scores.nbytes / scores.held.shape[1])
        done(_tokens(asks))
    sizes = [len(a.target) for a in cell.asks]
    return {**found, "sizes": sizes, "held_max": most, "bytes": round(max(nbytes))}


def is_found(value: Any) -> bool:
    """Whether something that was read has the form of what `measure` returns."""
    lists, single = ("logprobs", "hits", "held", "held_after", "sizes"), ("held_max", "bytes")
    if not isinstance(value, dict) or not isinstance(value.get("sizes"), list):
        return False
    shape = (len(value["sizes"]),)
    return all(cache.numbers(value.get(n), shape) for n in lists) and all(
        cache.numbers(value.get(n), ()) for n in single
    )


def _together(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Asks in a row that have one context."""
    return [list(group) for _, group in itertools.groupby(asks, key=lambda ask: id(ask.context))]


def _tokens(asks: Sequence[Ask]) -> int:
    contexts = sum(len(group[0].context) for group in _together(asks))
    return contexts + sum(len(a.question) + len(a.target) for a in asks)


def _batches(asks: Sequence[Ask], batch: int) -> list[tuple[int, list[int]]]:
    """Up to `batch` asks each, or all with one context, in order, with the length to which their contexts are padded:
    few different ones, and none at all where all contexts are equally long."""
    equal = len({len(a.context) for a in asks}) == 1
    groups: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}
    for i, ask in enumerate(asks):
        n = len(ask.context) if equal else bucket(len(ask.context))
        key = (n, id(ask.context)) if ask.kind else n
        groups.setdefault(key, []).append(i)
        sizes[key] = n
    return [
        (sizes[key], group[i : i + step])
        for key, group in groups.items()
        for step in (len(group) if isinstance(key, tuple) else batch,)
        for i in range(0, len(group), step)
    ]


def _score(lm: LM, asks: list[Ask], batch: int, length: int) -> tuple[continuation.Scores, list[int]]:
    """Scores of asks, and the row of the context of each. Where contexts are their own, the rows that are missing of
    a batch repeat the last one."""
    shared = bool(asks[0].kind)
    asks = asks if shared else asks + [asks[-1]] * (batch - len(asks))
    most = max(len(a.question) + len(a.target) for a in asks)
    # Short answers of similar sizes share a program.
    most = most if most >= 32 and not shared else -(-most // 4) * 4
    read = asks[:1] if shared else asks
    of = [0] * len(asks) if shared else None
    contexts = np.stack([np.pad(a.context, (0, length - len(a.context))) for a in read])
    rest = [np.concatenate([a.question, a.target]) for a in asks]
    targets = np.stack([np.pad(x, (0, most - len(x))) for x in rest])
    scores = continuation.score(lm, contexts, targets, [len(a.context) for a in read], list(map(len, rest)), of)
    return scores, of or list(range(len(asks)))


def rows(cell: Cell, found: dict[str, Any], dense: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the results. dense: what was found without a policy on the same texts, or None for that itself.

    "loss": nats per token; "added": what it adds to that of the dense cache, paired by window; "needle", "lambada":
    share of answers of which every token is the likeliest; "needle_nats", "lambada_nats": nats of an answer; "facts":
    the same, and "facts:KIND" of each kind.
    """
    groups = np.array([a.group for a in cell.asks])
    if cell.part == "loss":
        nats = -np.array(found["logprobs"]) / np.array(found["sizes"])
        values = {"loss": mean(nats)}
        if dense is not None:
            values["added"] = mean(nats + np.array(dense["logprobs"]) / np.array(dense["sizes"]))
    else:
        nats = -np.bincount(groups, found["logprobs"]) if cell.part == "lambada" else -np.array(found["logprobs"])
        hits = np.array(found["hits"])
        if cell.part == "lambada":
            hits = np.bincount(groups, ~hits) == 0
        values = {cell.part: proportion(hits), f"{cell.part}_nats": mean(nats)}
        kinds = np.array([a.kind for a in cell.asks])
        values |= {f"facts:{kind}": proportion(hits[kinds == kind]) for kind in sorted({*kinds.tolist()} - {""})}
    return [_row(cell, found, part, metric, groups) for part, metric in values.items()]


def _row(cell: Cell, found: dict[str, Any], part: str, metric: Metric, groups: np.ndarray) -> dict[str, Any]:
    asks = [a for a in cell.asks if part.partition(":")[2] in ("", a.kind)]
    row = {
        "policy": cell.method.name,
        "budget": cell.method.budget,
        "part": part,
        "source": cell.source,
        "value": metric.value,
        "stderr": None if math.isnan(metric.stderr) else metric.stderr,
        "held": float(np.mean(found["held"])),
        "held_after": float(np.mean(found["held_after"])),
        "held_max": found["held_max"],
        "bytes": found["bytes"],
        "windows": len({*groups.tolist()}) if cell.part == "lambada" else len(asks),
    }
    if part == "needle":
        hits = np.array(found["hits"])
        row["depths"] = [float(hits[groups == g].mean()) for g in range(groups.max() + 1)]
    return row


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = [("policy", "part", "source", "budget", "value", "stderr", "held", "max", "MB", "n")]
    for row in found:
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        budget = "-" if row["budget"] is None else str(row["budget"])
        cost = (f"{row['held']:,.0f}", f"{row['held_max']:,}", f"{row['bytes'] / 1e6:,.2f}", str(row["windows"]))
        lines.append((row["policy"], row["part"], row["source"], budget, f"{row['value']:.4f}", stderr, *cost))
    return columns(lines, 3)
