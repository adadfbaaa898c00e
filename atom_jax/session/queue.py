"""More continuations than there are rows: those that end make room for those that wait.

Prompts are read once, however many continuations they have. What a continuation says depends on its prompt and its
key alone: not on the number of rows, and not on what the others do.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from atom_jax import params as params_lib
from atom_jax.kvcache.paged import Level
from atom_jax.models import registry
from atom_jax.session import laid_out, sampling
from atom_jax.session.decode import Choice
from atom_jax.session.lane import Lane
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM

# Steps between looks at which rows have ended.
LOOK = 32
# Bytes of weights up to which the rows are dealt out to the cores of a CPU: about what a cache holds that the cores
# share. Every core reads all weights then; larger ones are better read once, by all cores for all rows.
SHARED = 32 * 2**20


class Made(NamedTuple):
    """A continuation. ids: without a stop id. ended: whether there was one; cut: whether it was ended by `watch`.
    held, read: f32 [steps], entries held and read as each token was read, averaged over layers and heads; there is
    one step fewer than tokens chosen, a stop id included."""

    ids: list[int]
    ended: bool
    cut: bool
    held: np.ndarray
    read: np.ndarray


class Stats(NamedTuple):
    """row_steps: steps of all rows, idle: those of rows that had ended."""

    row_steps: int
    idle: int


Watch = Callable[[int, Made], Iterable[int]]


def cores(lm: LM) -> int:
    """On how many cores of a CPU the rows of a batch are decoded apart."""
    if not laid_out.unrolls(lm) or params_lib.nbytes(lm.params) > SHARED:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    prompts: Session,
    jobs: Sequence[int],
    keys: jax.Array,
    how: sampling.Sampler,
    stop_ids: np.ndarray,
    most: int,
    rows: int = 64,
    watch: Watch | None = None,
) -> tuple[list[Made], Stats]:
    """Makes the continuations, each of up to `most` tokens, a stop id included.

    prompts: stays as it is. jobs, keys: of each continuation the row of its prompt, and with what it draws. stop_ids:
    as of `decode.Choice`. rows: so many at a time. watch: called with the number of a job that has ended and what it
    made; returns numbers of jobs that are to end where they are.
    """
    rows = min(rows, len(jobs))
    lanes = min(cores(prompts.lm), rows)
    queue = _Queue(jobs, keys, most, watch or (lambda number, made: ()))
    share = [rows // lanes + (i < rows % lanes) for i in range(lanes)]
    started = [_Lane(prompts, queue, n, how, stop_ids, lanes > 1) for n in share]
    with ThreadPoolExecutor(lanes) as threads:
        list((threads.map if lanes > 1 else map)(_Lane.run, started))
    return queue.made, Stats(sum(lane.steps for lane in started), sum(lane.idle for lane in started))


class _Queue:
    """Jobs that wait, and what was made. Lanes of several threads take from it."""

    def __init__(self, jobs: Sequence[int], keys: jax.Array, most: int, watch: Watch):
        self.jobs, self.most, self.watch = np.asarray(jobs), most, watch
        self.keys, self.kind = np.asarray(jax.random.key_data(keys)), jax.random.key_impl(keys)
        self.waiting = collections.deque(range(len(jobs)))
        self.made: list[Made] = [None] * len(jobs)
        self.cut: set[int] = set()

    def take(self, most: int) -> list[int]:
        """Up to so many jobs that wait; those that are cut before they began end here."""
        found: list[int] = []
        while len(found) < most and self.waiting:
            try:
                number = self.waiting.popleft()
            except IndexError:  # another thread was faster
                break
            if number in self.cut:
                self.end(number, _Row(number, -1).made(False, True))
            else:
                found.append(number)
        return found

    def end(self, number: int, made: Made) -> None:
        """Takes a job's result, and looks which others are to end."""
        self.made[number] = made
        self.cut.update(self.watch(number, made))


class _Row:
    """A job on its way."""

    def __init__(self, number: int, first: int):
        self.number, self.ids = number, [first] if first >= 0 else []
        self.held: list[np.ndarray] = []
        self.read: list[np.ndarray] = []

    def made(self, ended: bool, cut: bool) -> Made:
        join = lambda parts: np.concatenate([np.zeros(0, np.float32), *parts])  # noqa: E731
        return Made(self.ids, ended, cut, join(self.held), join(self.read))


class _Lane:
    """Rows that one thread decodes together."""

    def __init__(
        self, prompts: Session, queue: _Queue, rows: int, how: sampling.Sampler, stop_ids: np.ndarray, beside: bool
    ):
        self.prompts, self.queue, self.how, self.stop_ids, self.beside = prompts, queue, how, stop_ids, beside
        self.steps = self.idle = 0
        self.lane: Lane[_Row] = Lane()
        self.level = Level()
        numbers = queue.take(rows)
        self._join(numbers, len(numbers))

    def run(self) -> None:
        """Decodes until nothing is left."""
        while self._refilled():
            new, out = self.lane.decode(LOOK, self.queue.most)
            self.steps += int(new.max()) * len(new)
            self.idle += int((new.max() - new).sum())
            for row, n, tokens, held, read in zip(self.lane.owners, new, out.tokens, out.held, out.read):
                if row is not None and n:
                    row.ids += tokens[:n][tokens[:n] >= 0].tolist()
                    row.held.append(held[:n])
                    row.read.append(read[:n])

    def _refilled(self) -> bool:
        """Ends rows that are done, gives their places away, and says whether there is anything to do."""
        lane = self.lane
        done, made = lane.slots.done, lane.slots.made
        for r in lane.live:
            row = lane.owners[r]
            cut = row.number in self.queue.cut and not done[r]
            if done[r] or cut or made[r] >= self.queue.most:
                self.queue.end(row.number, row.made(bool(done[r]), cut))
                lane.owners[r] = None
        if numbers := self.queue.take(len(lane.free)):
            # In few sizes, which compile.
            self._join(numbers, 1 << (len(numbers) - 1).bit_length())
        elif lane.live and len(lane.owners) // 2 >= len(lane.live):
            lane.halve()
        return bool(lane.live)

    def _join(self, numbers: list[int], size: int) -> None:
        """These jobs, and copies of the first, in so many rows."""
        chosen, cfg = np.array([*numbers, *numbers[:1] * (size - len(numbers))]), self.prompts.lm.config
        keys = jax.random.wrap_key_data(self.queue.keys[chosen], impl=self.queue.kind)
        choice = Choice(keys, self.how, self.stop_ids, registry.of(cfg).codec(cfg))
        slots = Slots(self.prompts.rows(self.queue.jobs[chosen]), choice, self.beside, self.level)
        self.lane.join(slots, [_Row(number, int(first)) for number, first in zip(numbers, slots.first)])
