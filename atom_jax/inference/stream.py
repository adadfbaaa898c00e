"""Text of a growing row of tokens: whole characters only, cut at a stop string."""

from __future__ import annotations

import bisect
import codecs
from collections.abc import Iterable, Sequence
from typing import Any


class TextStream:
    """Collects the new tokens of one row.

    ids: tokens kept. text: their text so far, without what is held back. stopped: a stop string was found; the text
    ends right before it, and ids keeps the tokens that the text needs.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), before: int | None = None):
        """`before`: the last token of the prompt, on which the text of the first new token may depend."""
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = [s.encode("utf-8") for s in stop]
        self._before = before
        self._data = bytearray()
        self._ends: list[int] = []
        self._sent = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Takes more tokens; returns the text that became certain. Nothing is taken after a stop."""
        return "".join(map(self._push, ids))

    def _push(self, i: int) -> str:
        if self.stopped:
            return ""
        searched = len(self._data)
        self._data += self._bytes_of(i)
        self.ids.append(i)
        self._ends.append(len(self._data))
        self._before = i
        found = [at for s in self._stops if (at := self._data.find(s, max(0, searched - len(s) + 1))) >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        return self._emit(len(self._data) - self._held_back(), final=False)

    @property
    def certain(self) -> int:
        """How many of `ids` are kept whatever comes, since their text is."""
        return len(self.ids) if self.stopped else bisect.bisect_right(self._ends, self._sent)

    def finish(self) -> str:
        """Returns the text held back so far; a broken character becomes U+FFFD."""
        return "" if self.stopped else self._emit(len(self._data), final=True)

    def _bytes_of(self, i: int) -> bytes:
        # Decoded after its neighbour: some tokenizers drop a space at the beginning of a text.
        if self._before is None:
            return self._tokenizer.decode_bytes([i])
        skip = len(self._tokenizer.decode_bytes([self._before]))
        return self._tokenizer.decode_bytes([self._before, i])[skip:]

    def _cut(self, end: int) -> str:
        starts = [0, *self._ends[:-1]]
        self.ids = [i for i, start in zip(self.ids, starts) if start < end]
        return self._emit(end, final=True)

    def _held_back(self) -> int:
        """Bytes at the end that may be the beginning of a stop string."""
        return max(
            (
                n
                for s in self._stops
                for n in range(1, min(len(s), len(self._data) + 1))
                if self._data.endswith(s[:n])
            ),
            default=0,
        )

    def _emit(self, end: int, final: bool) -> str:
        piece = self._decoder.decode(bytes(self._data[self._sent : end]), final)
        self._sent = max(end, self._sent)
        self.text += piece
        return piece
