"""One text that an engine makes: what was asked for, and what came of it so far."""

from __future__ import annotations

import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax.inference.stream import TextStream
from atom_jax.session.decode import Choice, Said

# Why a text ended: at a stop id or string, at its limit, since nobody wants it any more, since something broke.
ENDS = ("stop", "length", "cancelled", "failed")


@dataclasses.dataclass(frozen=True)
class Mark:
    """What the model says of a chosen token: its log-probability, and the likeliest (id, log-probability)."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What became certain of a text: some of it, the tokens, and what the model says of them where that was asked
    for. end: one of ENDS with the last piece."""

    text: str
    ids: list[int]
    marks: list[Mark]
    end: str | None = None


class Request:
    """A text on its way. Iterating waits for its pieces; `result` for all of it.

    prompt: i32 [t]. most: tokens to make, a stop id included. choice: how; None at the end. made: tokens so far, a
    stop id included. ids, text, marks: what is certain so far. end: one of ENDS, None before. error: what broke.
    entries: that the model held of it at last, averaged over layers and heads. known: tokens of the prompt that were
    known from others. seconds: until the first token, 0 before.
    """

    def __init__(
        self, prompt: np.ndarray, most: int, choice: Choice, tokenizer: Any, stop: Sequence[str], told: int | None,
        listen: Callable[[Piece], None] | None,
    ):  # fmt: skip
        self.prompt, self.most = prompt, most
        self.choice: Choice | None = choice
        self.ids: list[int] = []
        self.text, self.marks = "", []
        self.end: str | None = None
        self.error: str | None = None
        self.entries, self.seconds, self.known, self.made = 0.0, 0.0, 0, 0
        self.unwanted = False
        self._told, self._pieces = told, queue.SimpleQueue()
        self._listen = listen or self._pieces.put
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop, before=int(prompt[-1]))
        self._new: list[int] = []
        self._marks: list[Mark] = []
        self._began = time.monotonic()

    def cancel(self) -> None:
        """Nobody wants it any more: it ends soon, wherever it is."""
        self.unwanted = True

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.end is not None:
                self._pieces.put(piece)  # for whoever iterates again
                return

    def result(self) -> Request:
        """Itself, once it has ended."""
        for _ in self:
            pass
        return self

    def take(self, new: Sequence[int], said: Said | None, ended: bool) -> str | None:
        """Adds tokens, -1: none, and what the model says where each was chosen. ended: a stop id is among them.
        Why the text is to end here, or None. For the engine."""
        self.seconds = self.seconds or time.monotonic() - self._began
        self.made += len(new)
        kept = [i for i in new if i >= 0]
        if self._told is not None and said is not None:
            self._marks += [self._mark(i, said, k) for k, i in enumerate(new) if i >= 0]
        if self._stream is None:
            self._new += kept
        try:
            text = "" if self._stream is None else self._stream.push(kept)
        except Exception as e:  # this text's own; others are served on
            self.error = f"{type(e).__name__}: {e}"
            return "failed"
        self.tell(self._piece(text, None))
        ended |= self._stream is not None and self._stream.stopped
        return "stop" if ended else "length" if self.made >= self.most else None

    def finish(self, end: str, error: str | None = None) -> Piece:
        """Ends the text; the last piece, for `tell`. For the engine."""
        self.error, self.choice = error or self.error, None
        return self._piece("" if self._stream is None else self._stream.finish(), end)

    def tell(self, piece: Piece) -> None:
        """Gives a piece to who listens. For the engine."""
        if piece.text or piece.ids or piece.end is not None:
            try:
                self._listen(piece)
            except Exception:  # not the engine's: others are served on
                logging.getLogger(__name__).exception("who listens to a request broke")
                self.cancel()

    def _mark(self, i: int, said: Said, k: int) -> Mark:
        named = zip(said.ids[k][: self._told].tolist(), said.logprobs[k][: self._told].tolist())
        return Mark(i, float(said.logprob[k]), [(j, p) for j, p in named if j >= 0])

    def _piece(self, text: str, end: str | None) -> Piece:
        ids = self._new if self._stream is None else self._stream.ids[: self._stream.certain]
        piece = Piece(text, ids[len(self.ids) :], self._marks[len(self.ids) : len(ids)], end)
        self.ids, self.text, self.end = self.ids + piece.ids, self.text + text, end
        self.marks = self.marks + piece.marks
        return piece
