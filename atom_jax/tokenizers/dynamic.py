"""Dynamic tokenization (Feher et al., 2024, "Retrofitting Large Language Models with Dynamic Tokenization",
2411.18553): neighbours that are frequent in a batch become one token, again and again, up to a boundary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from atom_jax.tokenizers.byte_level import complaint
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.typing import AtomError

BOUNDARIES = ("pretokens", "word", "word_hyphen", "sentence")
_SPACES = frozenset(b" \t\n")
_PUNCTUATION, _DIGITS = frozenset(b".,!?;:()-\"'\\/`$%&*+<=>@[]^_{|}~"), frozenset(b"0123456789")
_WORDS = pre_tokenizers.WhitespaceSplit()


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch after merging.

    rows: i32 [n] each; ids from `size` on are made ones. size: of the vocabulary. pieces: bytes of the made ones.
    merges: the pairs that were merged, in order. totals: i64 [merges + 1], tokens of the batch after so many of them.
    """

    rows: list[np.ndarray]
    size: int
    pieces: list[bytes]
    merges: list[tuple[bytes, bytes]]
    totals: np.ndarray


class Merger:
    """Merges neighbours in batches of a tokenizer's tokens.

    boundary: what a token may not go beyond: "pretokens" (what the tokenizer splits texts into), "word" (what stands
    between spaces), "word_hyphen" (the same, and of punctuation only "-" is put after something else) or "sentence"
    (all but spaces, which in any case only stand first in a token, or by themselves). Special tokens stay alone.
    Parts of characters may be merged with anything. Raises AtomError for other boundaries, for tokenizers that split
    by no rule where that is asked for, and for those whose tokens have no bytes.
    """

    def __init__(self, tokenizer: Any, boundary: str = "pretokens"):
        if boundary not in BOUNDARIES:
            raise AtomError(f"boundary: expected one of {', '.join(BOUNDARIES)}, got {boundary!r}")
        self.view, self.boundary = byte_view(tokenizer), boundary
        backend = getattr(tokenizer, "backend", None)
        self._splitter = None if backend is None else backend.pre_tokenizer
        if boundary == "pretokens" and (self._splitter is None or tokenizer.kind != "bytes"):
            raise AtomError(f"boundary: {self.view.name} splits texts by no rule of its own; take word or sentence")

    def joins(self, left: bytes, right: bytes) -> bool:
        """Whether two ordinary tokens may become one."""
        both = left + right
        spaces = [b in _SPACES for b in both]
        if any(spaces[1:]) and (both == b"\n\n" or not all(spaces)):
            return False
        if self.boundary == "sentence":
            return True
        try:
            text = both.decode("utf-8")
        except UnicodeDecodeError:
            return True
        splitter = self._splitter if self.boundary == "pretokens" else _WORDS
        with complaint(f"{self.view.name}: tokenizer.json cannot split {text[:40]!r}"):
            whole = len(splitter.pre_tokenize_str(text)) == 1
        if whole and self.boundary == "word_hyphen" and self._punctuation(right) and not self._punctuation(left):
            return right == b"-"
        return whole

    def merge(self, rows: Sequence[np.ndarray], most: int | None = None) -> Merged:
        """Merges up to `most` times (None: until no pair is left): the pair of neighbours that is most frequent in
        the batch, of equals the one seen first, wherever it stands, from left to right. A token that the vocabulary
        has is that one, whatever it was merged from.

        rows: i32 [n] each. Raises AtomError where all are empty.
        """
        if not any(len(row) for row in rows):
            raise AtomError("merge: the batch has no token")
        pairs = _Pairs(self)
        # -1 ends every row.
        tokens = np.concatenate([np.append(row, -1) for row in rows]).astype(np.int64)
        pair = np.append(pairs.numbers(tokens[:-1], tokens[1:]), 0)
        merges, totals = [], [len(tokens) - len(rows)]
        while most is None or len(merges) < most:
            counts = np.bincount(pair, minlength=1)
            counts[0] = 0
            first = int(np.argmax(counts[pair]))
            if not pair[first]:
                break
            a, b = tokens[first], tokens[first + 1]
            at = _apart(np.flatnonzero(pair == pair[first])) if a == b else np.flatnonzero(pair == pair[first])
            tokens[at] = pairs.joined(a, b)
            merges.append((pairs.piece(a), pairs.piece(b)))
            keep = np.ones(len(tokens), bool)
            keep[at + 1] = False
            tokens, pair, at = tokens[keep], pair[keep], at - np.arange(len(at))
            changed = np.unique([at, np.maximum(at - 1, 0)])
            pair[changed] = pairs.numbers(tokens[changed], tokens[changed + 1])
            totals.append(len(tokens) - len(rows))
        out = [row[:-1].astype(np.int32) for row in np.split(tokens, np.flatnonzero(tokens < 0) + 1)[:-1]]
        return Merged(out, self.view.size, pairs.made, merges, np.array(totals))

    def _punctuation(self, piece: bytes) -> bool:
        """Whether the vocabulary has such a token, with punctuation and without digits."""
        return piece in self.view.ids and bool(_PUNCTUATION & {*piece}) and not _DIGITS & {*piece}


class _Pairs:
    """Numbers from 1 on of the pairs of neighbours that may be merged, and tokens that were made."""

    def __init__(self, merger: Merger):
        self.merger, self.view = merger, merger.view
        self.made: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._known: dict[int, int] = {}

    def piece(self, i: int) -> bytes:
        return self.made[i - self.view.size] if i >= self.view.size else self.view.pieces[int(i)]

    def joined(self, a: int, b: int) -> int:
        """The token of two."""
        both = self.piece(a) + self.piece(b)
        if both in self.view.ids:
            return self.view.ids[both][0]
        if both not in self._ids:
            self._ids[both] = self.view.size + len(self.made)
            self.made.append(both)
        return self._ids[both]

    def numbers(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Of each pair of i64 [n], 0 for those that may not be merged."""
        keys, where = np.unique(left << 32 | right, return_inverse=True)
        return np.array([self._number(int(key)) for key in keys], np.int64)[where]

    def _number(self, key: int) -> int:
        if key not in self._known:
            a, b = key >> 32, key & 0xFFFFFFFF
            lacks = key < 0 or any(i < self.view.size and i not in self.view.pieces for i in (a, b))
            may = not lacks and self.merger.joins(self.piece(a), self.piece(b))
            self._known[key] = len(self._known) + 1 if may else 0
        return self._known[key]


def mean_lengths(merger: Merger, batches: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """Mean tokens f64 [m + 1] of a row after 0, 1, ... merges in its batch, until no batch has any left. They depend
    on the size of batches: in larger ones a merge does more."""
    found = [(merger.merge(rows).totals, len(rows)) for rows in batches]
    if not found:
        raise AtomError("mean_lengths: there is no batch")
    longest = max(len(totals) for totals, _ in found)
    padded = [np.pad(totals, (0, longest - len(totals)), mode="edge") for totals, _ in found]
    return np.sum(padded, axis=0) / sum(rows for _, rows in found)


def merges_for(lengths: np.ndarray, share: float) -> int:
    """The fewest merges after which this share (0 to 1) of the possible reduction is reached, from `mean_lengths`."""
    if not 0 <= share <= 1:
        raise AtomError(f"share: expected a number from 0 to 1, got {share!r}")
    goal = lengths[0] - share * (lengths[0] - lengths[-1])
    return int(np.argmax(lengths <= goal + 1e-9 * lengths[0]))


def _apart(at: np.ndarray) -> np.ndarray:
    """Of positions i64 [n], ascending, those that are left when in runs of neighbours every second goes."""
    begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)
    place = np.arange(len(at)) - np.repeat(begins, np.diff(np.append(begins, len(at))))
    return at[place % 2 == 0]
