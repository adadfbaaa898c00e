"""Rows to which tokens are added, call by call: the host's side of `decode`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.paged import Level, in_pages
from atom_jax.models import registry
from atom_jax.session import laid_out, programs
from atom_jax.session.decode import Choice, Made, State, begin, decode, decode_beside
from atom_jax.session.session import Session


class Slots:
    """The rows of a session while tokens are chosen for them. It takes the session over, which is used up.

    choice: how tokens are chosen, for as many rows. beside: others like this decode at the same time, on other cores.
    level: rows will come and go, and pages have its sizes; None: they stay.
    first: i32 [b], the tokens that are chosen at once, from what the session has read; -1 where there is none, since
    it is a stop id, or a token waits to be read or to get its form. told: what the model says of them, where
    somebody is told.
    """

    # Tokens that a row may come to read in one call of the model.
    _ahead = 1

    def __init__(self, session: Session, choice: Choice, beside: bool = False, level: Level | None = None):
        self.choice, self._lm, self._params = choice.each, session.lm, session.params
        self._decode = decode_beside() if beside else decode
        self._compiled: list[Any] = []
        self._level = level
        memory = self._fitted(session.usable())
        latest = session.token, session.x_bd, session.open_b
        token, done, made, told = begin(self._params, memory.length, *latest, self.choice, cfg=self._lm.config)
        self._state = State(memory, token, done, made)
        # On the host: for operations of their own, arrays of every new shape are compiled.
        chosen = (self.made > 0) & ~self.done
        self.first, self.told = np.where(chosen, np.asarray(token), -1), jax.tree.map(np.asarray, told)

    @property
    def done(self) -> np.ndarray:
        """Rows that have ended, bool [b]."""
        return np.asarray(self._state.done)

    @property
    def made(self) -> np.ndarray:
        """Tokens chosen so far, i32 [b]."""
        return np.asarray(self._state.made)

    @property
    def session(self) -> Session:
        """Where the rows stand now. Decoding on uses it up, and the other way round."""
        return Session(self._lm, self._params, self._state.memory, self._state.token, None)

    def end(self, rows_b: np.ndarray) -> None:
        """Ends rows, bool [b]."""
        if (rows_b & ~self.done).any():
            self._state = self._state.replace(done=self._state.done | rows_b)

    def prepare(self, until: Any) -> None:
        """Makes room, where one of the rows that go on to `until` tokens has none, and compiles `decode`."""
        state, until = self._state, np.asarray(until, np.int32)
        if self._short(until):
            memory = memory_lib.grow(state.memory, self._ahead, singly=True)
            self._state = state.replace(memory=self._fitted(memory))
        shapes = [x.shape for x in jax.tree.leaves(self._state)]
        if shapes != self._compiled:
            # No step is taken.
            self._state, _ = self._call(np.zeros_like(until))
            self._compiled = shapes

    def _short(self, until: np.ndarray) -> bool:
        """Whether a row that goes on has no room."""
        return bool(programs.short(self._state.memory, ~self.done & (self.made < until)))

    def decode(self, until: Any) -> Made:
        """Chooses tokens until every row that hasn't ended has `until` of them, i32 [] or [b]; or fewer: at most
        CHUNK at once, and none for which `prepare` has not made room."""
        self._state, made = self._call(np.asarray(until, np.int32))
        return jax.tree.map(np.asarray, made)

    def _call(self, until: np.ndarray) -> tuple[State, Made]:
        return self._decode(self._params, self._state, self.choice, until, cfg=self._lm.config)

    def put(self, index_b: Sequence[int], other: Slots) -> None:
        """Gives these rows, i32 [n], to those of `other`, which has n of them and is given up: with their keys, and
        what they have chosen. A row of it is left out where its index is none of these."""
        index, old, new = np.asarray(index_b, np.int32), self._state, other._state

        def place(a: jax.Array, b: jax.Array) -> jax.Array:
            return a.at[index].set(b, mode="drop")

        memory = self._fitted(memory_lib.put(old.memory, index, new.memory))
        latest = (old.token, old.done, old.made), (new.token, new.done, new.made)
        self._state = State(memory, *jax.tree.map(place, *latest))
        self.choice = self.choice.map(place, other.choice)

    def clear(self, index_b: Sequence[int]) -> None:
        """Gives up the pages of these rows, i32 [n], where memory has such; numbers of none are left out."""
        index, state = np.asarray(list(index_b), np.int32), self._state
        if not in_pages(state.memory):
            return
        empty = registry.of(self._lm.config).init_cache(self._lm.config, len(index), 1)
        empty = memory_lib.unstack(empty) if laid_out.unrolls(self._lm) else empty
        memory = self._fitted(memory_lib.put(state.memory, index, empty))
        self._state = state.replace(memory=memory, done=state.done.at[index].set(True, mode="drop"))

    def rows(self, index_b: Sequence[int]) -> Slots:
        """These rows in this order, each with its key, some perhaps repeatedly, others left out; a copy."""
        session, index = self.session.rows(index_b), jnp.asarray(index_b, jnp.int32)
        new = copy.copy(self)
        new.choice, new.first = self.choice.map(lambda x: x[index]), self.first[np.asarray(index)]
        new._state = State(
            self._fitted(session.memory), session.token, self._state.done[index], self._state.made[index]
        )
        return new

    def _fitted(self, memory: Memory) -> Memory:
        return memory if self._level is None else self._level(memory)
