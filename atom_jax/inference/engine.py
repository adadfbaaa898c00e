"""A model that serves many at once: requests join and leave one running batch, each as if it were alone."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from atom_jax import config
from atom_jax.inference.request import Piece, Request
from atom_jax.kvcache.paged import Level
from atom_jax.models import registry
from atom_jax.models.family import Codec
from atom_jax.session import reading, sampling
from atom_jax.session.cost import Cost
from atom_jax.session.decode import CHUNK, NAMED, Choice, Said
from atom_jax.session.lane import Lane
from atom_jax.session.parts import Beginnings, Parts
from atom_jax.session.prompts import end_ids, listed, token_rows
from atom_jax.session.session import ROOM, Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM, AtomError

# Steps between looks at what was made, at who left and who waits.
LOOK = 8
# Tokens of prompts that are read between two looks.
PART = 256
# Stop ids of a request, all forms counted.
STOPS = 32


class Busy(AtomError):
    """So many requests wait that no further one is taken."""


class Closed(AtomError):
    """The engine takes no requests any more."""


@dataclasses.dataclass
class Tally:
    """What an engine has done, and does. ended: requests by their end. prompt_tokens, of which known: those that were
    not read again; new_tokens; row_steps: steps of rows, of which idle: those without a text; first_seconds: from
    `submit` to the first token, added up over `started` requests. running, reading, waiting: requests now. rows: of
    the batch. nbytes: buffers of all memory; entries: that running texts hold, added up, averaged over layers and
    heads. peak_running, peak_nbytes: the most requests in one step, and what the batch's memory took then at most."""

    ended: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    known: int = 0
    new_tokens: int = 0
    row_steps: int = 0
    idle: int = 0
    started: int = 0
    first_seconds: float = 0.0
    running: int = 0
    reading: int = 0
    waiting: int = 0
    rows: int = 0
    nbytes: int = 0
    entries: float = 0.0
    peak_running: int = 0
    peak_nbytes: int = 0


class Engine:
    """Makes texts in a thread of its own, until `close`; also a context manager.

    rows: texts at once. length: most tokens of a prompt and what follows; None: the model's positions.
    cache_memory: bytes that the memory of the batch may take; a request is begun when what it and the others are
    expected to need fits. None: `rows` alone decide. waiting: most requests that wait. part: tokens of prompts that
    are read between two looks, `look`: steps between them. beginnings: of prompts, so many of which are kept for
    others that begin alike.

    What a request gives depends on itself alone: it is what `generate` gives for its prompt and its key.
    """

    def __init__(
        self, lm: LM, rows: int = 16, length: int | None = None, cache_memory: int | None = None, waiting: int = 256,
        part: int = PART, look: int = LOOK, beginnings: int = 4,
    ):  # fmt: skip
        self.lm, self.tally = lm, Tally()
        self.rows, self.waiting = config.whole("rows", rows, 1), config.whole("waiting", waiting, 1)
        most = lm.config.max_length
        self.length = most if length is None else config.whole("length", length, 2, most)
        self.cache_memory = None if cache_memory is None else config.whole("cache_memory", cache_memory, 1)
        self._part, self._look = config.whole("part", part, 16), config.whole("look", look, 1, CHUNK)
        self._beginnings = Beginnings(config.whole("beginnings", beginnings, 0))
        self._codec, self._cost = registry.of(lm.config).codec(lm.config), Cost(lm.config)
        self.tells = type(self._codec) is Codec
        self._waiting: collections.deque[Request] = collections.deque()
        self._reading: collections.deque[tuple[Request, Parts]] = collections.deque()
        self._lane: Lane[Request] = Lane()
        self._longest = 0  # text that the lane's buffers are made for
        self._level = Level()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(
        self, prompt: str | Sequence[int], max_new_tokens: int = 64, temperature: float = 0.0, key: Any = None, *,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None, logprobs: int | None = None,
        listen: Callable[[Piece], None] | None = None,
    ) -> Request:  # fmt: skip
        """A request for one text; `generate` says what the arguments mean.

        logprobs: with every token what the model says of it, and of so many of the likeliest; None: nothing. listen:
        called with every piece, in the engine's thread, in place of iterating over the request.
        Raises AtomError for what `generate` refuses and for what can never fit, Busy where too many wait, and Closed.
        """
        most = config.whole("max_new_tokens", max_new_tokens, 1)
        stop = [stop] if isinstance(stop, str) else listed("stop", stop)
        if any(not isinstance(text, str) or not text for text in stop):
            raise AtomError(f"stop: expected a string that is not empty, or a list of such, got {stop!r}")
        if stop and self.lm.tokenizer is None:
            raise AtomError("this model has no tokenizer: stop strings need one")
        if logprobs is not None:
            config.whole("logprobs", logprobs, 0, NAMED)
            if not self.tells:
                raise AtomError("logprobs: this model chooses bytes and their forms, of which there are none")
        how, ends = sampling.sampler(temperature, top_k, top_p, min_p), end_ids(self.lm, stop_ids)
        if len(ends) > STOPS:
            raise AtomError(f"stop_ids: at most {STOPS - 1} ids, all forms counted")
        ids = token_rows(self.lm, [prompt], first=True)[0]
        if len(ids) + most > self.length:
            raise AtomError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {most} exceed the {self.length} tokens of a row"
            )
        asks = np.array([logprobs is not None]) if self.tells else None
        ends = np.pad(ends, (0, STOPS - len(ends)), constant_values=-1)
        choice = Choice(sampling.row_keys(key, 1), how, ends, self._codec, asks)
        request = Request(ids, most, choice, self.lm.tokenizer, stop, logprobs, listen)
        if self.cache_memory is not None and (need := self._need([request], 1, 0, None)) > self.cache_memory:
            raise AtomError(f"the request may need {need:,} bytes of memory; there are {self.cache_memory:,}")
        with self._changed:
            if self._closing:
                raise Closed("the engine is being closed and takes no requests")
            if len(self._waiting) >= self.waiting:
                raise Busy(f"{self.waiting} requests wait already; try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request

    @property
    def together(self) -> threading.Condition:
        """A context inside of which nothing is begun: the thread's requests are begun together when it ends."""
        return self._changed

    def refuse(self) -> None:
        """Takes no further requests, and ends once those that it has are made."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Takes no further requests, gives those that it has so many seconds, cancels what is left, and ends."""
        self.refuse()
        self._thread.join(seconds)
        while self._thread.is_alive():
            for request in self._all():
                request.cancel()
            self._thread.join(0.05)

    def _all(self) -> list[Request]:
        with self._changed:
            lane = [owner for owner in self._lane.owners if owner is not None]
            return [*self._waiting, *(request for request, _ in self._reading), *lane]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._reading or self._lane.live)
                if not (self._waiting or self._reading or self._lane.live):
                    return
            try:
                self._leave()
                self._admit()
                self._read()
                self._decode()
            except Exception as e:  # whatever breaks, others are served on
                logging.getLogger(__name__).exception("the batch broke")
                self._break(f"{type(e).__name__}: {e}")
            self._count()

    def _leave(self) -> None:
        """Ends what nobody wants any more."""
        with self._changed:
            gone = [request for request in self._waiting if request.unwanted]
            self._waiting = collections.deque(r for r in self._waiting if not r.unwanted)
            gone += [request for request, _ in self._reading if request.unwanted]
            self._reading = collections.deque((r, parts) for r, parts in self._reading if not r.unwanted)
        rows = [r for r in self._lane.live if self._lane.owners[r].unwanted]
        gone += [self._lane.owners[r] for r in rows]
        try:
            self._free(rows)
        finally:
            for request in gone:
                self._end(request, "cancelled")

    def _admit(self) -> None:
        """Begins with those that wait, in order, while there is room."""
        with self._changed:
            begun = [*(request for request, _ in self._reading), *(self._lane.owners[r] for r in self._lane.live)]
            while self._waiting and len(begun) < self.rows:
                request = self._waiting[0]
                # One alone was found to fit when it came.
                if not self._fits([*begun, request]) and begun:
                    return
                parts = Parts(
                    self.lm, request.prompt, min(request.most, ROOM), self._part, self._beginnings, self._level
                )
                self._reading.append((self._waiting.popleft(), parts))
                begun.append(request)

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Whether the memory suffices for a batch of these."""
        rows, most = 1 << (len(requests) - 1).bit_length(), self.cache_memory
        if most is None or self._need(requests, rows, self._longest, self._level) > most:
            return most is None
        # Rows that nobody has would grow along with the others.
        while (
            len(self._lane.owners) > rows
            and self._need(requests, len(self._lane.owners), self._longest, self._level) > most
        ):
            self._lane.halve()
        return True

    def _need(self, requests: Sequence[Request], rows: int, longest: int, level: Level | None) -> int:
        """Bytes that a batch of these in so many rows, whose buffers are made for `longest` tokens or more, is
        expected to take until they end; level: see `Cost.nbytes`."""
        entries = []
        for request in requests:
            # What is held already, and what is expected of the tokens to come.
            whole, now = len(request.prompt) + request.most, len(request.prompt) + request.made
            later = self._cost.expected(whole) - (self._cost.expected(now) if request.entries else 0)
            entries.append(request.entries + later)
        longest = max(longest, *map(self._size, requests))
        return self._cost.nbytes(rows, longest, entries, level)

    def _size(self, request: Request) -> int:
        """Tokens that its buffers are made for: whole parts while a prompt is read in several."""
        n, part = len(request.prompt), self._part
        whole = -(-n // part) * part if n > part and reading.plan(self.lm.config).pieces else 0
        return max(n + request.most, whole)

    def _read(self) -> None:
        """Reads parts of prompts, of each in turn, up to about `part` tokens."""
        left = self._part
        while self._reading and left > 0:
            request, parts = self._reading[0]
            try:
                n, session = parts.read()
            except Exception as e:  # such as a prompt for which there is no memory; others are served on
                n, session = 0, None
                logging.getLogger(__name__).exception("a prompt could not be read")
                self._end(request, "failed", f"{type(e).__name__}: {e}")
            left -= n
            if session is not None:
                request.known = parts.known
                self._start(request, session)
            with self._changed:
                self._reading.popleft()
                if session is None and request.end is None:
                    self._reading.append((request, parts))

    def _start(self, request: Request, session: Session) -> None:
        """Chooses the first token after a prompt, and gives the text a row."""
        slots = Slots(session, request.choice, level=self._level)
        self.tally.prompt_tokens += len(request.prompt)
        self.tally.known += request.known
        if slots.made[0]:
            end = self._take(request, slots.first.tolist(), slots.told, bool(slots.done[0]))
            if end is not None:
                request.entries = float(slots.session.use()[0][0])
                self._end(request, end)
                return
        self._longest = max(self._longest, self._size(request))
        self._lane.join(slots, [request])

    def _decode(self) -> None:
        """Makes up to `look` tokens in every row, and frees those of texts that have ended."""
        lane = self._lane
        if not lane.live:
            return
        most = [0 if owner is None else owner.most for owner in lane.owners]
        new, out = lane.decode(self._look, most)
        done, ended = lane.slots.done, {}
        self.tally.peak_running = max(self.tally.peak_running, len(lane.live))
        self.tally.peak_nbytes = max(self.tally.peak_nbytes, lane.slots.session.nbytes)
        self.tally.row_steps += int(new.max()) * len(new)
        self.tally.idle += int((new.max() - new).sum())
        for r in lane.live:
            request, n = lane.owners[r], int(new[r])
            if n:
                request.entries = float(out.held[r][n - 1])
                said = jax.tree.map(lambda x, r=r: x[r], out.said)
                ended[r] = self._take(request, out.tokens[r][:n].tolist(), said, bool(done[r]))
        rows = [r for r, end in ended.items() if end is not None]
        gone = [(lane.owners[r], ended[r]) for r in rows]
        try:
            self._free(rows)
        finally:
            for request, end in gone:
                self._end(request, end)

    def _take(self, request: Request, new: list[int], said: Said | None, ended: bool) -> str | None:
        """Gives tokens to a request; why it is to end, or None."""
        first = not request.made
        end = request.take(new, said, ended)
        self.tally.started += first
        self.tally.first_seconds += request.seconds if first else 0.0
        return end

    def _free(self, rows: list[int]) -> None:
        """Gives up rows, and with them memory that nobody needs."""
        lane = self._lane
        for r in rows:
            lane.owners[r] = None
        if not lane.live:
            self._lane, self._longest = Lane(), 0
            return
        if rows:
            size = 1 << (len(rows) - 1).bit_length()
            lane.slots.clear([*rows, *[len(lane.owners)] * (size - len(rows))])
        if 4 * len(lane.live) <= len(lane.owners) and not (self._reading or self._waiting):
            lane.halve()

    def _end(self, request: Request, end: str, error: str | None = None) -> None:
        piece = request.finish(end, error)
        self.tally.ended[end] += 1
        self.tally.new_tokens += len(request.ids)
        self._count()
        request.tell(piece)

    def _break(self, error: str) -> None:
        """Ends all that was begun."""
        with self._changed:
            begun = [request for request, _ in self._reading]
            begun += [owner for owner in self._lane.owners if owner is not None]
            self._reading.clear()
            self._lane, self._longest = Lane(), 0
        for request in dict.fromkeys(begun):
            if request.end is None:
                self._end(request, "failed", error)

    def _count(self) -> None:
        lane, tally = self._lane, self.tally
        running = [lane.owners[r] for r in lane.live]
        tally.running, tally.reading, tally.waiting = len(running), len(self._reading), len(self._waiting)
        tally.rows, tally.entries = len(lane.owners), sum(request.entries for request in running)
        tally.nbytes = self._beginnings.nbytes + sum(parts.nbytes for _, parts in self._reading)
        tally.nbytes += 0 if lane.slots is None else lane.slots.session.nbytes
