"""What a step of decoding takes after a long context, with everything kept and with part of it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax.evaluation.metrics import columns
from atom_jax.kvcache.paged import AHEAD
from atom_jax.models import registry
from atom_jax.session import sampling
from atom_jax.session.decode import CHUNK, Choice
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM, AtomError
from benchmarks import machine


@dataclasses.dataclass(frozen=True)
class Speed:
    """context: tokens seen when the last measured one is made. rows: batch sizes. seen: fewer tokens, for which the
    budget policy is measured too. repeats: measurements, of `new` tokens per row each."""

    context: int = 8192
    rows: tuple[int, ...] = (1, 8)
    seen: tuple[int, ...] = (2048, 4096)
    repeats: int = 5
    new: int = 8

    def __post_init__(self):
        if min((self.context, self.repeats, self.new, *self.rows, *self.seen)) < 1:
            raise AtomError("speed: expected numbers of at least 1")
        if self.steps > min(CHUNK, AHEAD):
            raise AtomError(f"speed: {self.repeats} repeats of {self.new} tokens; at most {AHEAD - 1} in all")
        if self.least <= 0:
            raise AtomError(f"speed: contexts must have more than {self.steps * len(self.rows)} tokens")

    @property
    def steps(self) -> int:
        """Tokens per row that one batch size takes; the first one doesn't count."""
        return 1 + self.repeats * self.new

    @property
    def least(self) -> int:
        """Length of the shortest prompt."""
        return min(self.context, *self.seen) - self.steps * len(self.rows)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with one batch size.

    seen: tokens per row at the end. held: entries per head, mean over layers, heads and rows. weights, live, buffers:
    bytes of the weights, of the keys and values of held entries, and of the buffers with all that belongs to them.
    seconds: of a step, every measurement. factor, predicted: dense seconds, or dense bytes (weights and held
    entries), over those here; None where the dense cache was not measured.
    """

    method: str
    rows: int
    seen: int
    held: float
    weights: float
    live: float
    buffers: float
    seconds: list[float]
    factor: float | None = None
    predicted: float | None = None


class Runner:
    """A model that has read a prompt and can decode, in float32 on one device, layer by layer."""

    def __init__(self, name: str, lm: LM, layers: Any, prompt: np.ndarray, capacity: int, alike: bool = True):
        """layers: `decode_params` of the model, unrolled. capacity: tokens for which a dense cache has room."""
        self.name, self.lm, self.rows, self.fewer = name, lm, 1, not alike
        ids, lengths = padded([prompt])
        capacity = max(capacity, ids.shape[1])
        session = Session.begin(lm, ids, lengths, capacity=capacity, params=layers, unroll=True)
        keys, none = sampling.row_keys(None, 1), np.full(8, -1, np.int32)
        self.slots = Slots(session, Choice(keys, sampling.sampler(), none))

    def batch(self, rows: int) -> None:
        """The same state in every one of `rows` rows; there is one before. Compiles."""
        if rows > 1:
            self.slots, self.rows = self.slots.rows([0] * rows), rows
        self.slots.prepare(0)

    def step(self, new: int) -> float:
        """Makes `new` tokens in every row; seconds per token of a row."""
        began = time.perf_counter()
        tokens = self.slots.decode(self.slots.made[0] + new).tokens
        taken = (time.perf_counter() - began) / new
        if (tokens[:, :new] < 0).any():
            raise RuntimeError(f"{self.name}: the cache was full before {new} tokens were made")
        return taken

    def result(self, seconds: list[float]) -> Row:
        """What was measured, and what the memory holds now."""
        cfg, session = self.lm.config, self.slots.session
        held = float(session.use()[0].mean())
        entry = 2 * cfg.head_dim * machine.FLOAT
        return Row(
            self.name, self.rows, int(session.length[0]), held, machine.weight_bytes(config.to_json(cfg)),
            held * entry * cfg.n_layers * cfg.n_kv_heads * self.rows, session.nbytes, seconds,
        )  # fmt: skip


def measure(
    models: Sequence[tuple[str, LM]], prompt: np.ndarray, speed: Speed, say: Callable[[str], None]
) -> Iterator[list[Row]]:
    """Rows for each batch size, and, with the first, those of fewer tokens.

    models: under their names, the dense one first; models whose memory is a budget are also measured after fewer
    tokens. Methods take turns, so that what else the machine does disturbs all of them alike.
    """
    laid_out: dict[int, Any] = {}
    runners = []
    for name, lm in models:
        # Models without evictors of their own share their weights.
        key = id(lm.params["embed"]), "dms" in lm.params["layers"]["attn"] and id(lm)
        if key not in laid_out:
            laid_out[key] = registry.of(lm.config).decode_params(lm.params, lm.config, unroll=True)
        budget = getattr(lm.config.memory, "budget", 0)
        for seen in (speed.context, *(speed.seen if budget else ())):
            say(f"{name}: reading {seen:,} tokens")
            length = seen - speed.steps * len(speed.rows)
            fewer = seen != speed.context
            runners.append(Runner(name, lm, laid_out[key], prompt[:length], seen, not fewer))
    for i, rows in enumerate(speed.rows):
        if i:
            runners = [r for r in runners if not r.fewer]
        for runner in runners:
            say(f"{runner.name}: compiling for {rows} rows")
            runner.batch(rows)
            runner.step(1)
        seconds: list[list[float]] = [[] for _ in runners]
        for n in range(speed.repeats):
            for j in np.roll(np.arange(len(runners)), n):
                say(f"{runners[j].name}, {rows} rows, {n + 1} of {speed.repeats}")
                seconds[j].append(runners[j].step(speed.new))
        yield related([r.result(s) for r, s in zip(runners, seconds, strict=True)])


def related(rows: list[Row]) -> list[Row]:
    """The rows with their factors over the first one, of those with as many tokens seen."""
    first = rows[0]
    out = []
    for row in rows:
        if row.seen == first.seen:
            factor = statistics.median(first.seconds) / statistics.median(row.seconds)
            row = dataclasses.replace(
                row, factor=factor, predicted=(first.weights + first.live) / (row.weights + row.live)
            )
        out.append(row)
    return out


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines = [(
        "method", "rows", "seen", "held", "MB held", "MB buffers", "buffers/held", "MB weights", "ms/step", "tok/s",
        "faster", "by bytes",
    )]  # fmt: skip
    for r in rows:
        step = statistics.median(r.seconds)
        factor = ("-", "-") if r.factor is None else (f"{r.factor:.2f}x", f"{r.predicted:.2f}x")
        lines.append((
            r.method, str(r.rows), f"{r.seen:,}", f"{r.held:,.0f}", f"{r.live / 1e6:,.1f}", f"{r.buffers / 1e6:,.1f}",
            f"{r.buffers / r.live:.2f}", f"{r.weights / 1e6:,.0f}", f"{1e3 * step:,.1f}", f"{r.rows / step:,.1f}",
            *factor,
        ))  # fmt: skip
    return columns(lines, 1)
