"""Rows to which tokens are added with drafts: the host's side of `drafts.loop`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dense import bucket
from atom_jax.session.decode import CHUNK, Choice, Made, State
from atom_jax.session.drafts import loop
from atom_jax.session.drafts.drafter import Drafter, Text
from atom_jax.session.drafts.pace import Pace
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots

# Tokens without drafts, by which the time of a call is measured.
MEASURED = 4


class DraftSlots(Slots):
    """As `Slots`, and makes the same tokens.

    texts: i32 [n] of every row, what is known of its text, the latest token last. drafter, most: who makes drafts,
    and their longest. until: tokens that rows are to have in the end. learned: the drafter's own arrays, or None.
    tried, accepted: i64 [b], tokens of drafts so far. steps: i64 [b], calls of the model in which the row took part.
    queries: f64, entries that all queries read, drafts included, where each reads by itself.
    """

    def __init__(
        self, session: Session, choice: Choice, beside: bool, texts: Sequence[np.ndarray], drafter: Drafter,
        most: int, until: int, learned: Any = None,
    ):  # fmt: skip
        super().__init__(session, choice, beside)
        self._program, self._drafter, self._until = loop.compiled(), drafter, until
        most = min(most, drafter.reach(learned) or most)
        self.pace, self._ahead = Pace(most), most + 1
        self._ready: dict[int, list[Any]] = {}
        b = len(texts)
        self.tried, self.accepted, self.steps = np.zeros((3, b), np.int64)
        self.queries, self._tally = 0.0, None
        length = np.array([len(text) for text in texts], np.int32)
        ids = np.zeros((b, bucket(int(length.max()) + until + most + 1)), np.int32)
        for row, text in zip(ids, texts):
            row[: len(text)] = text
        # A token that was chosen already is new; one that waits to be read, or got its form, is the latest.
        new = np.asarray(self._state.made)
        ids[np.arange(b), length + new - 1] = np.asarray(self._state.token)
        text = Text(jnp.asarray(ids), jnp.asarray(length + new))
        known, token = drafter.init(text, self._lm.config.vocab_size, learned), self._state.token
        own = loop.Own(text, known, jnp.full(b, loop.START, jnp.float32))
        # What lies elsewhere would be compiled for once more.
        self._own = jax.device_put(own, token.sharding) if token.committed else own
        self._learned = learned

    def prepare(self, until: Any) -> None:
        """Makes room, where one of the rows that go on to `until` tokens has none, and compiles."""
        compiling = self._lm.kept.get("compiling_drafts", 0.0)
        self.pace.choose(self._until - int(self.made.min()), self._ready, compiling)
        self._compiled = self._ready.get(self.pace.n, [])
        began = time.perf_counter()
        super().prepare(until)
        if self._ready.get(self.pace.n) != self._compiled:
            self._ready = {n: shapes for n, shapes in self._ready.items() if shapes == self._compiled}
            self._ready[self.pace.n] = self._compiled
            self._lm.kept["compiling_drafts"] = max(compiling, time.perf_counter() - began)

    def _short(self, until: np.ndarray) -> bool:
        return bool(loop.lacks_room(self._state, until, n=self.pace.n))

    def decode(self, until: Any) -> Made:
        """See `Slots.decode`."""
        until = np.asarray(until, np.int32)
        if not self.pace.measures:
            return self._timed(until)
        first = self._timed(np.minimum(until, self.made.min(where=~self.done, initial=CHUNK) + MEASURED))
        return _joined(first, self._timed(until))

    def _timed(self, until: np.ndarray) -> Made:
        began = time.perf_counter()
        made = super().decode(until)
        tally = jax.tree.map(np.asarray, self._tally)
        self.tried, self.accepted = self.tried + tally.tried, self.accepted + tally.accepted
        self.steps, self.queries = self.steps + tally.steps, self.queries + float(tally.queries.sum())
        if tally.calls:
            self.pace.take(int(tally.calls), int(tally.wide), tally.reached, time.perf_counter() - began)
        return made

    def _call(self, until: np.ndarray) -> tuple[State, Made]:
        n, price = self.pace.n, np.float32(self.pace.price(self.pace.n))
        state, self._own, made, self._tally = self._program(
            self._params, self._learned, self._state, self._own, self.choice, until, price, cfg=self._lm.config,
            drafter=self._drafter, n=n,
        )  # fmt: skip
        return state, made

    def rows(self, index_b: Sequence[int]) -> DraftSlots:
        """See `Slots.rows`."""
        new, index = super().rows(index_b), np.asarray(index_b)
        new._own = jax.tree.map(lambda x: x[index], self._own)
        new.tried, new.accepted, new.steps = self.tried[index], self.accepted[index], self.steps[index]
        return new


def _joined(one: Made, two: Made) -> Made:
    """What two calls made, as one, without the gaps between what their steps gave."""

    def joined(one: np.ndarray, two: np.ndarray, none: int) -> np.ndarray:
        out = np.full_like(one, none)
        for row, first, second in zip(out, one, two):
            both = np.concatenate([first[first > none], second[second > none]])
            row[: len(both)] = both
        return out

    pairs = ((one.tokens, two.tokens, -1), (one.held, two.held, 0), (one.read, two.read, 0))
    return Made(*(joined(*pair) for pair in pairs), np.maximum(one.peak, two.peak))
