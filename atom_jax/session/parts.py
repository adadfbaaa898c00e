"""Prompts that are read part by part, and the beginnings that they share, which are read once."""

from __future__ import annotations

import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.paged import Level
from atom_jax.session import laid_out, reading
from atom_jax.session.prompts import padded
from atom_jax.session.session import LEAST, Session
from atom_jax.typing import LM

# Beginnings that are remembered by name, to know whether one comes again.
NAMES = 1024


class Beginnings:
    """What a model keeps of the latest beginnings that came more than once, `most` of them. They are as long as a
    number of whole parts."""

    def __init__(self, most: int):
        self.most = most
        self._names: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._kept: collections.OrderedDict[bytes, Memory] = collections.OrderedDict()

    @property
    def nbytes(self) -> int:
        """Size of all that is kept."""
        return sum(map(memory_lib.nbytes, self._kept.values()))

    def longest(self, ids: np.ndarray, part: int) -> tuple[int, Memory | None]:
        """How many of these tokens are known, less than all, and a copy of the memory of them."""
        for n in range((len(ids) - 1) // part * part, 0, -part):
            if (name := _name(ids[:n])) in self._kept:
                self._kept.move_to_end(name)
                return n, jax.tree.map(jnp.copy, self._kept[name])
        return 0, None

    def seen(self, ids: np.ndarray, memory: Memory) -> None:
        """Takes note of what was read, and of the memory of it, of which it keeps a copy when it comes again."""
        name = _name(ids)
        if name in self._names and name not in self._kept and self.most:
            self._kept[name] = jax.tree.map(jnp.copy, _sized(memory, len(ids)))
        self._names[name] = None
        for known, most in ((self._names, NAMES), (self._kept, self.most)):
            while len(known) > most:
                known.popitem(last=False)


def _sized(memory: Memory, slots: int) -> Memory:
    """The memory with so many slots where every token has one."""
    return memory_lib.map_layers(lambda layer: layer.sized(slots), memory)


def _name(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16).digest()


class Parts:
    """A prompt, i32 [t], on its way into a model's memory: where that may be, in parts of `part` tokens, else whole.

    room: further tokens for which there is to be room. beginnings: what is known already. known: how many tokens
    were, when reading began.
    """

    def __init__(self, lm: LM, ids: np.ndarray, room: int, part: int, beginnings: Beginnings, level: Level):
        self._lm, self._ids, self._room, self._beginnings, self._level = lm, ids, room, beginnings, level
        self._pieces = reading.plan(lm.config).pieces
        self._part = part if self._pieces else len(ids)
        whole = -(-len(ids) // self._part) * self._part if len(ids) > self._part else 0
        self._capacity = bucket(max(len(ids) + room, whole), LEAST)
        self._at, self._memory, self.known = 0, None, 0

    @property
    def nbytes(self) -> int:
        """Size of the memory of the parts that were read."""
        return 0 if self._memory is None else memory_lib.nbytes(self._memory)

    def read(self) -> tuple[int, Session | None]:
        """Reads the next part: how many tokens, and the session once the prompt is whole."""
        lm, cfg = self._lm, self._lm.config
        if self._pieces and not self._at:
            self._at, memory = self._beginnings.longest(self._ids, self._part)
            self._memory, self.known = None if memory is None else _sized(memory, self._capacity), self._at
        new = self._ids[self._at : self._at + self._part]
        if not self._pieces:
            return len(new), Session.prefill(lm, [new], room=self._room)
        # Later parts are of one size.
        ids, length = padded([new], self._part if self._at else 0)
        if self._memory is None:
            x_bd, memory = reading.first(lm.params, ids, length, cfg=cfg, capacity=self._capacity)
        else:
            x_bd, memory, _ = reading.read(lm.params, ids, length, self._memory, cfg=cfg)
        self._at += len(new)
        if self._at < len(self._ids):
            self._beginnings.seen(self._ids[: self._at], memory)
            self._memory = memory
            return len(new), None
        memory = self._level(memory_lib.unstack(memory) if laid_out.unrolls(lm) else memory)
        self._memory = None
        return len(new), Session.after(lm, laid_out.of(lm), memory, ids, length, x_bd)
