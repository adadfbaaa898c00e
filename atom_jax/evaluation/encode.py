"""From texts to what the model scores: token ids, of which those after `start` count.

The boundary between a context and its continuation. Spaces and line breaks at the end of a context move to the
continuation, because most tokenizers attach a space to the word after it. Then both are encoded as one text. If no
token straddles the boundary, that is the encoding; if one does, the two are encoded apart: half a token has no
probability. With a byte tokenizer nothing straddles. The bytes counted for a continuation include what moved to it.

The front (what the tokenizer puts before every text, else bos, else eos) stands before a document in training; it
comes before every text that is scored from its first token on, and before contexts where the tokenizer has its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from atom_jax.tokenizers.base import beginning
from atom_jax.typing import AtomError


class Item(NamedTuple):
    """ids i32 [n]: tokens start..n-1 (start >= 1) are scored, each given all those before it."""

    ids: np.ndarray
    start: int


class Piece(NamedTuple):
    """A continuation as the model sees it: windows of tokens, and the UTF-8 bytes of the text that is scored."""

    items: list[Item]
    nbytes: int
    # The context did not fit and lost its beginning.
    cut: bool


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes texts for a model.

    tokenizer: any `tokenizers.Tokenizer`.
    length: most tokens that the model may see at once.
    always_front: whether contexts begin with the front.
    """

    tokenizer: Any
    length: int
    always_front: bool

    def pair(self, context: str, continuation: str) -> Piece:
        """A continuation after a context. A context too long for the model loses its beginning; a continuation longer
        than half of `length` is scored in windows."""
        kept = context.rstrip()
        moved = context[len(kept) :] + continuation
        first = front(self.tokenizer) if self.always_front or not kept else []
        before, after = self._split(kept, moved)
        start = len(first) + len(before)
        ids = np.concatenate([np.array(first, np.int32), before, after])
        items = windows(ids, start, self.length, self.length // 2)
        return Piece(items, len(moved.encode()), cut=items[0].start < start)

    def document(self, text: bytes, context: int) -> tuple[list[Item], list[int]]:
        """A whole document in windows, every token scored once, given at least `context` tokens (fewer only at the
        beginning). Returns the windows and the number of bytes that each of them scores."""
        ids, spans = self.tokenizer.spans(text)
        if not len(ids):
            return [], []
        first = np.array(front(self.tokenizer), np.int32)
        items = windows(np.concatenate([first, ids]), len(first), self.length, context)
        firsts = np.cumsum([0] + [len(item.ids) - item.start for item in items[:-1]])
        edges = [0, *spans[firsts[1:], 0].tolist(), len(text)]
        return items, np.diff(edges).tolist()

    def _split(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        boundary = len(context.encode())
        ids, spans = self.tokenizer.spans(context + continuation)
        k = int(np.sum(spans[:, 1] <= boundary))
        if np.all(spans[k:, 0] >= boundary):
            return ids[:k], ids[k:]
        return self.tokenizer.encode(context), self.tokenizer.encode(continuation)


def front(tokenizer: Any) -> list[int]:
    """The front. Raises AtomError for a tokenizer that has none."""
    if not (first := beginning(tokenizer)):
        raise AtomError("the tokenizer has neither bos nor eos, so the first token of a text has no probability")
    return first


def windows(ids: np.ndarray, start: int, length: int, context: int) -> list[Item]:
    """Cuts ids i32 [n] into windows that score each of the tokens start..n-1 once.

    A window has at most `length` tokens before its last one, and before each scored token at least `context` of them
    (fewer only where the sequence has no more).

    Raises AtomError unless 1 <= context <= length.
    """
    if not 1 <= context <= length:
        raise AtomError(f"a context of {context} tokens does not fit windows of {length}")
    items, last = [], len(ids) - 1
    while start <= last:
        first = max(0, start - context)
        end = min(last, first + length)
        if end == last:
            first = max(0, last - length)
        items.append(Item(ids[first : end + 1], start - first))
        start = end + 1
    return items
