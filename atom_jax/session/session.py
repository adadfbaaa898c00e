"""A session: rows of text that a model has read, and its memory of them, from which any loop goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.lasting import paged
from atom_jax.kvcache.memory import Memory
from atom_jax.models import registry
from atom_jax.session import laid_out, programs, prompts, reading
from atom_jax.typing import LM, AtomError

# Room for new tokens that a memory starts with, and its least size. A larger one is read for nothing, a smaller one
# is compiled for sooner.
ROOM = 128
LEAST = 256


@dataclasses.dataclass(frozen=True)
class Session:
    """Rows that a model has read, b of them, and what it keeps of each.

    A session doesn't change: what reads gives another one. It may write into the memory of the session before,
    though, which is used up then; `fork` makes one that stays, to go on from one place several times.

    lm: the model. params: its parameters as generation reads them (`laid_out.of`). memory: what it keeps. token: i32
    [b], the latest token of every row. x_bd: [b, d], final states after it; None where it was chosen but not read.
    open_b: bool [b], rows whose latest token was given without its form, in models that decide late on that
    (`Codec.pending`; None in others): x_bd is what comes before it then, and it is said once more, in its form, to
    `step` or `verify`.
    leans: what fetches the pages of a lasting memory on disk on which rows lean, open as long as a session is there.
    """

    lm: LM
    params: Any = dataclasses.field(repr=False)
    memory: Memory = dataclasses.field(repr=False)
    token: jax.Array
    x_bd: jax.Array | None = dataclasses.field(repr=False)
    open_b: jax.Array | None = dataclasses.field(default=None, repr=False)
    leans: tuple[paged.Fetch, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "leans", paged.fetches(self.memory))

    @classmethod
    def prefill(
        cls, lm: LM, texts: Any, *, room: int = ROOM, longest: int = 0, params: Any = None,
        memory: Memory | None = None, on_part: Callable[[int], None] | None = None,
    ) -> Session:  # fmt: skip
        """Reads the beginning of every row.

        Args:
          texts: one text, or texts or lists of token ids, of any lengths. Texts of byte models get the bos first.
          room: further tokens per row for which there is room at once; the memory grows where there are more.
          longest: length of a longer prompt whose shapes are to be used. params: in place of `laid_out.of(lm)`.
          memory: what the rows have read before, as the stacked layers of `lm` keep it; it is given up. None: they
            begin.
          on_part: called with the number of tokens read so far, as a long text is read in parts; where the memory has
            to see a prompt whole, never.
        Raises AtomError for empty prompts, ids out of range, and a prompt longer than the model's positions.
        """
        ids, lengths = prompts.padded(prompts.token_rows(lm, texts, first=memory is None), longest)
        capacity = bucket(max(longest, int(lengths.max())) + room, LEAST)
        params = laid_out.of(lm) if params is None else params
        unroll = laid_out.unrolls(lm)
        return cls.begin(
            lm, ids, lengths, capacity=capacity, params=params, unroll=unroll, memory=memory, on_part=on_part
        )

    @classmethod
    def begin(
        cls, lm: LM, ids_bt: np.ndarray, length_b: np.ndarray, *, capacity: int, params: Any, unroll: bool,
        memory: Memory | None = None, on_part: Callable[[int], None] | None = None,
    ) -> Session:  # fmt: skip
        """As `prefill`, from ids i32 [b, t], padded on the right, and their lengths i32 [b], at least 1.

        capacity: tokens per row for which there is room in an empty memory. params: as lm has them, or laid out.
        unroll: they are laid out layer by layer, as the memory is to be. memory, on_part: as for `prefill`.
        """
        _check_positions(lm, int((length_b + (0 if memory is None else np.asarray(memory.length))).max()))
        mask = np.arange(ids_bt.shape[1])[None] < length_b[:, None]
        suffix = registry.of(lm.config).codec(lm.config).suffix(lm.tokenizer, ids_bt, mask)
        # A prompt goes through the scanned layers in any case: they compile in a fraction of the time.
        scanned = laid_out.scanned(lm) if unroll else params
        if memory is None:
            x_bd, memory = reading.first(
                scanned, ids_bt, length_b, suffix, cfg=lm.config, capacity=capacity, on_part=on_part
            )
        else:
            memory = reading.agreed(scanned, ids_bt, length_b, memory, cfg=lm.config)
            x_bd, memory, _ = reading.read(scanned, ids_bt, length_b, memory, cfg=lm.config, on_part=on_part)
        memory = memory_lib.unstack(memory) if unroll else memory
        return cls.after(lm, params, memory_lib.trim(memory), ids_bt, length_b, x_bd)

    @classmethod
    def after(
        cls, lm: LM, params: Any, memory: Memory, ids_bt: np.ndarray, length_b: np.ndarray, x_bd: jax.Array
    ) -> Session:  # fmt: skip
        """Where rows stand whose latest tokens were ids i32 [b, t], so many of each (i32 [b], at least 1), with x_bd
        [b, d] the states of the last. params: laid out as the memory is."""
        return cls(lm, params, memory, *_latest(lm, ids_bt, length_b, x_bd))

    def extend(self, texts: Any) -> Session:
        """Reads further tokens of every row, at least one of each, as texts or lists of ids. Uses this session up."""
        rows = prompts.token_rows(self.lm, texts, first=False)
        self._check_rows(len(rows))
        session = self._settled() if self.x_bd is None and reading.plan(self.lm.config).waits else self
        if session.x_bd is None:
            rows = [np.append(token, row) for token, row in zip(np.asarray(self.token), rows)]
        return session.read(*prompts.padded(rows))[0]

    def read(self, ids_bt: np.ndarray, length_b: np.ndarray) -> tuple[Session, list[jax.Array]]:
        """As `extend`, from ids i32 [b, t], padded on the right, and their lengths i32 [b] (0: none), where no token
        waits to be read; also the final states of all of them, [b, n, d] part by part (where the form of tokens is
        decided late, the states before them)."""
        _check_positions(self.lm, int((self.length + length_b).max()))
        x_bd, memory, states = reading.read(self.params, ids_bt, length_b, self.usable(), cfg=self.lm.config)
        new = length_b > 0
        latest = _latest(self.lm, ids_bt, length_b, x_bd)
        if not new.all():
            latest = jax.tree.map(
                lambda a, b: jnp.where(new.reshape(-1, *[1] * (a.ndim - 1)), a, b),
                latest, (self.token, self.x_bd, self.open_b),
            )  # fmt: skip
        if reading.plan(self.lm.config).shrinks:
            memory = memory_lib.grow(memory, memory_lib.SPARE, singly=True)
        return Session(self.lm, self.params, memory, *latest), states

    def step(self, token_b: Any = None, live_b: Any = None) -> Session:
        """Reads one more token of every row, i32 [b], to its end; None: the latest ones, which were chosen and not
        read. live_b: bool [b], rows that take part; None: all. Uses this session up."""
        if (token_b is None) != (self.x_bd is None):
            what = "has none that was not read" if token_b is None else "has one that is to be read first: step()"
            raise AtomError(f"step: expected a token for every row; this session {what}")
        return self._settled(token_b, live_b)

    def verify(self, draft_bn: Any, count_b: Any = None) -> Tried:
        """Reads n further tokens of every row without keeping any: what the model would say after each of them, and
        `Tried.accept`. draft_bn: i32 [b, n]; count_b: i32 [b], how many of them a row has (None: n), in front.

        Single tokens are read as by `step`, whatever the memory's policy is. This session stays as it is.
        """
        draft, counts = np.asarray(draft_bn), count_b
        if draft.ndim != 2 or not np.issubdtype(draft.dtype, np.integer):
            raise AtomError(f"verify: expected ids of shape [B, N], got {draft.dtype} of shape {list(draft.shape)}")
        b, n = draft.shape
        self._check_rows(b)
        prompts.check_ids(draft, self.lm.config.vocab_size)
        counts = np.full(b, n) if counts is None else np.asarray(counts)
        if counts.shape != (b,) or counts.min() < 0 or counts.max() > n:
            raise AtomError(f"verify: expected {b} counts between 0 and {n}, got {counts.tolist()}")
        ids, unread = jnp.asarray(draft, jnp.int32), self.x_bd is None
        if unread:
            ids, counts = jnp.concatenate([self.token[:, None], ids], axis=1), counts + 1
        _check_positions(self.lm, int((self.length + counts).max()))
        counts, memory = jnp.asarray(counts, jnp.int32), self.usable()
        if ids.shape[1] == 0:
            return Tried(self, memory, None, ids, counts, self.x_bd[:, None])
        memory = memory_lib.grow(memory, ids.shape[1], singly=True)
        x_bnd, pending = programs.attempt(self.params, memory, ids, counts, cfg=self.lm.config)
        if not unread:
            x_bnd = jnp.concatenate([self.x_bd[:, None], x_bnd], axis=1)
        return Tried(self, memory, pending, ids, counts, x_bnd)

    def rows(self, index_b: Sequence[int]) -> Session:
        """These rows in this order, some perhaps repeatedly, others left out; a copy."""
        index, b = np.asarray(index_b), len(self.token)
        if index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= b:
            raise AtomError(f"rows: expected numbers from 0 to {b - 1}, got {index.tolist()}")
        index = jnp.asarray(index, jnp.int32)
        latest = jax.tree.map(lambda x: x[index], (self.token, self.x_bd, self.open_b))
        return Session(self.lm, self.params, memory_lib.rows(self.usable(), index), *latest)

    def fork(self) -> Session:
        """A copy, which stays when this session is used up."""
        own = jax.tree.map(jnp.copy, (self.usable(), self.token, self.x_bd, self.open_b))
        return Session(self.lm, self.params, *own)

    @property
    def logits(self) -> jax.Array:
        """What the model says of every row's next token, or of the form of the latest where that is left open: f32
        [b, v]."""
        if self.x_bd is None:
            raise AtomError("logits: the latest tokens of this session were chosen and not read; step() reads them")
        self.check()
        return programs.logits(self.params, self.x_bd, cfg=self.lm.config)

    def check(self) -> None:
        """Raises the AtomError of a page of a lasting memory on disk that could not be read. Waits for what is being
        computed, where rows lean on one."""
        if self.leans:
            jax.block_until_ready((self.token, self.x_bd))
        for fetch in self.leans:
            if fetch.failed is not None:
                raise fetch.failed

    @property
    def length(self) -> np.ndarray:
        """Tokens that the model has read of every row, i32 [b]."""
        return np.asarray(self.usable().length)

    @property
    def spent(self) -> bool:
        """Whether another session has taken over this one's memory."""
        return _deleted(self.memory)

    @property
    def nbytes(self) -> int:
        """Size of the memory's buffers."""
        return memory_lib.nbytes(self.memory)

    def use(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries that each row holds, and that its latest token read: f32 [b] each, averaged over layers and
        key/value heads."""
        held_b, read_b = programs.use(self.memory)
        return np.asarray(held_b), np.asarray(read_b)

    def _settled(self, token_b: Any = None, live_b: Any = None) -> Session:
        """The session once these tokens (None: the latest ones) are read, each to its end."""
        b = len(self.token)
        token = self.token if token_b is None else jnp.asarray(token_b, jnp.int32)
        live = jnp.ones(b, bool) if live_b is None else jnp.asarray(live_b, bool)
        if token.shape != (b,) or live.shape != (b,):
            raise AtomError(f"step: expected {b} tokens, one for each row, got shape {list(token.shape)}")
        memory = self.usable()
        if bool(programs.short(memory, live)):
            memory = memory_lib.grow(memory)
        x_bd, memory = programs.step(self.params, memory, token, live, self.x_bd, cfg=self.lm.config)
        open_b = None if self.open_b is None else self.open_b & ~live
        return Session(self.lm, self.params, memory, jnp.where(live, token, self.token), x_bd, open_b)

    def usable(self) -> Memory:
        """The memory, where it is not given up."""
        if self.spent:
            raise AtomError("this session has been continued already, and its memory is given up; fork() it before")
        return self.memory

    def _check_rows(self, rows: int) -> None:
        if rows != len(self.token):
            raise AtomError(f"this session has {len(self.token)} rows, but {rows} are given")


@dataclasses.dataclass(frozen=True)
class Tried:
    """What `Session.verify` found. logits: f32 [b, n + 1, v], what the model says after so many of the n tokens."""

    session: Session = dataclasses.field(repr=False)
    memory: Memory = dataclasses.field(repr=False)
    pending: Any = dataclasses.field(repr=False)
    ids: jax.Array
    counts: jax.Array
    x_bnd: jax.Array = dataclasses.field(repr=False)

    @property
    def logits(self) -> jax.Array:
        """See above."""
        return programs.logits(self.session.params, self.x_bnd, cfg=self.session.lm.config)

    def accept(self, count_b: Any) -> Session:
        """The session in which every row has read the first count_b, i32 [b], of its tokens and nothing else. Uses up
        the one that tried them."""
        session, b = self.session, len(self.ids)
        count = np.asarray(count_b)
        unread = session.x_bd is None
        most = np.asarray(self.counts) - unread
        if count.shape != (b,) or (count < 0).any() or (count > most).any():
            raise AtomError(f"accept: expected up to {most.tolist()} tokens of the rows, got {count.tolist()}")
        if _deleted(self.memory):
            raise AtomError("accept: the session that tried these tokens has been continued already")
        count = jnp.asarray(count + unread, jnp.int32)
        ids = jnp.concatenate([session.token[:, None], self.ids], axis=1)
        token = jnp.take_along_axis(ids, count[:, None], axis=1)[:, 0]
        x_bd = jnp.take_along_axis(self.x_bnd, (count - unread)[:, None, None], axis=1)[:, 0]
        memory = self.memory
        if self.pending is not None:
            memory = programs.commit(session.params, memory, self.pending, self.ids, count, cfg=session.lm.config)
        open_b = None if session.open_b is None else session.open_b & (count == 0)
        return Session(session.lm, session.params, memory, token, x_bd, open_b)


def _latest(lm: LM, ids: np.ndarray, lengths: np.ndarray, x_bd: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """token, x_bd and open_b of a session after these ids."""
    pending = registry.of(lm.config).codec(lm.config).pending
    return jnp.asarray(ids[np.arange(len(ids)), lengths - 1]), x_bd, jnp.ones(len(ids), bool) if pending else None


def _deleted(memory: Memory) -> bool:
    return any(x.is_deleted() for x in jax.tree.leaves(memory))


def _check_positions(lm: LM, longest: int) -> None:
    if longest > lm.config.max_length:
        raise AtomError(f"a row of {longest} tokens exceeds the {lm.config.max_length} positions of the model")
