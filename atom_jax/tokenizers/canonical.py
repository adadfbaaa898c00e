"""Which tokens may follow which: a sequence is canonical where it is what a tokenizer makes of its own text."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import numpy as np

from atom_jax.tokenizers.byte_level import complaint
from atom_jax.tokenizers.byte_view import ByteView, byte_view
from atom_jax.tokenizers.merges import Merges

# Splitting rules look at what follows a run of spaces: these are the kinds of things that may, each with characters
# that tokens with a space in front seldom begin with.
_AFTER_SPACE = ("a", "\u0436", "\u4e2d", "1", "#", "~", "\u2603", "\n")
# Vocabularies of which every token is looked at, and sequences of which it is remembered what may follow.
_SMALL, _TAILS = 4096, 256
# Tokens of one kind that are sooner encoded one by one.
_FEW = 16
# Tokens back to which a place is looked for where texts are split whatever follows.
_FAR = 32
_SPACE = frozenset(b" \t\n\r\v\f")
# Kinds of tokens that splitting rules treat alike, with texts of each that are looked at for all: letters, signs but
# for the apostrophe (contractions), and either with a space in front.
_SIGNS = rb"[!-&(-/:-@\[-`{-~]+"
_KINDS = (
    (rb"[a-z]+", ("a", "zq")), (rb"[A-Za-z]*[A-Z][A-Za-z]*", ("B", "aB", "Ba", "BC")), (_SIGNS, ("!", "(;", "-")),
    (b" " + _SIGNS, (" !", " (;", " -")), (rb" [a-z]+", (" a", " zq")),
    (rb" [A-Za-z]*[A-Z][A-Za-z]*", (" B", " aB", " Ba", " BC")),
)  # fmt: skip


class Canonical:
    """The vocabulary of a tokenizer by the bytes of its tokens, and which of them may follow a canonical sequence.

    view: ByteView. first: i32 [ids], the first byte of each token; 256 for special ones, 257 for ids that stand for
    nothing. sizes: i32 [ids]; flat u8 and starts i64 [ids]: their bytes one after another.

    Where the tokenizer splits texts by a rule, sequences are encoded again from the last place where any rule splits:
    between something and a space with a letter after it; a run of spaces may be cut as any of its continuations asks
    for. Without such a rule, and inside of characters, two neighbours that stay apart are enough for vocabularies
    that were made by merging. Within a word they are too: tokens of one kind (_KINDS) after the same text are not
    encoded one by one, but looked up among the merges. Rules that look far ahead (digits grouped from the right) are
    beyond this.
    """

    def __init__(self, tokenizer: Any):
        self.view: ByteView = byte_view(tokenizer)
        self._tokenizer = tokenizer
        size = self.view.size
        pieces = [self.view.pieces.get(i, b"") for i in range(size)]
        self.sizes = np.array([len(p) for p in pieces], np.int32)
        self.flat = np.frombuffer(b"".join(pieces), np.uint8)
        self.starts = (np.cumsum(self.sizes) - self.sizes).astype(np.int64)
        self.first = np.full(size, 257, np.int32)
        self.first[self.sizes > 0] = self.flat[self.starts[self.sizes > 0]]
        self.first[[i for i in self.view.special if i < size]] = 256
        self.ids_by_first = [np.flatnonzero(self.first == b) for b in range(256)]
        backend = getattr(tokenizer, "backend", None)
        self._splits = backend is not None and tokenizer.kind == "bytes" and backend.pre_tokenizer is not None
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._merges = Merges.of(backend, size) if self._splits else None

    def byte_at(self, ids: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Byte number `at` of tokens, i32."""
        return self.flat[self.starts[ids] + at].astype(np.int32)

    def text(self, ids: Any) -> bytes:
        """The bytes of tokens, of special ones those of their names."""
        view = self.view
        return b"".join(view.pieces.get(int(i)) or view.special.get(int(i), "").encode("utf-8") for i in ids)

    def follows(self, ids: tuple[int, ...], candidates: np.ndarray) -> np.ndarray:
        """bool [n]: which of the tokens `candidates`, i64 [n], may follow this canonical sequence. Special ones
        always may, and ids that stand for nothing never."""
        tail = ids[self._cut(ids) :]
        if tail not in self._known and len(self._known) > _TAILS:
            self._known = {(): self._known[()]} if () in self._known else {}
        known = self._known.setdefault(tail, np.where(self.first < 256, -1, self.first == 256).astype(np.int8))
        asked = candidates[known[candidates] < 0]
        if len(asked):
            free = self._begins[asked] & bool(tail and self._splits and not self._ends_in_space(tail[-1]))
            if free.any():
                known[asked[free]] = self.follows((), asked[free])
            left = asked[~free]
            for kind in range(len(_KINDS)) if tail and self._merges is not None else ():
                like = self._kinds[left] == kind
                if like.sum() > _FEW and (found := self._alike(tail, kind, left[like])) is not None:
                    known[left[like]], left = found, left[~like]
            known[left] = self._kept(tail, left)
        return known[candidates] > 0

    def likely(self, logp: np.ndarray) -> np.ndarray:
        """Ids of which alone it is worth knowing whether they may follow, given log-probabilities f64 [ids]: the
        others have less than a millionth together. Of small vocabularies all."""
        if len(logp) <= _SMALL:
            return np.arange(len(logp))
        order = np.argsort(logp)
        return order[np.searchsorted(np.cumsum(np.exp(logp[order])), 1e-6) :]

    def settled(self, ids: tuple[int, ...]) -> int:
        """How many of the tokens of a text stay, whatever follows."""
        if self._splits:
            return self._cut(ids)
        size, i = 0, len(ids)
        while i > 0 and size < self.view.longest and ids[i - 1] not in self.view.special:
            i -= 1
            size += self.sizes[ids[i]]
        return i

    def _cut(self, ids: tuple[int, ...]) -> int:
        """The last token that begins where texts are split whatever comes; with no splitting the last token. Special
        tokens split in any case."""
        if not self._splits:
            return len(ids) - bool(ids and ids[-1] not in self.view.special)
        for i in range(len(ids) - 1, max(len(ids) - _FAR, 0) - 1, -1):
            if ids[i] in self.view.special:
                return i + 1
            if i and self._begins[ids[i]] and not self._ends_in_space(ids[i - 1]):
                return i
        return max(len(ids) - _FAR, 0)

    def _ends_in_space(self, i: int) -> bool:
        return self.view.pieces.get(i, b"-")[-1] in _SPACE

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        """bool [ids]: tokens that begin with a space and a letter."""

        def is_letter(piece: bytes) -> bool:
            return len(piece) > 1 and piece[0] == 32 and piece[1:].decode("utf-8", "replace")[0].isalpha()

        return np.array([is_letter(self.view.pieces.get(i, b"")) for i in range(self.view.size)], bool)

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        """i32 [ids]: the place in _KINDS of tokens that are made by merging, -1 for others."""
        out = np.full(self.view.size, -1, np.int32)
        for place, (pattern, _) in enumerate(_KINDS):
            fits = re.compile(pattern).fullmatch
            out[[i for i, piece in self.view.pieces.items() if fits(piece)]] = place
        return np.where(self._merges.sure, out, -1)

    def _alike(self, tail: tuple[int, ...], kind: int, candidates: np.ndarray) -> np.ndarray | None:
        """As `_kept`, for candidates of one kind: those that begin texts and stay apart from the word before them.
        None where the splitting rule cuts probes of this kind differently, or the word is not what it would be."""
        try:
            text = self.text(tail).decode("utf-8")
        except UnicodeDecodeError:
            return None
        if "'" in text:  # contractions depend on the very letters
            return None
        starts, cut = set(), self._tokenizer.backend.pre_tokenizer.pre_tokenize_str
        for probe in _KINDS[kind][1]:
            *_, (_, (begin, end)) = cut(text + probe)
            starts.add(begin if end == len(text) + len(probe) else -1)
        if len(starts) > 1 or -1 in starts or max(starts) > len(text):
            return None
        at, sizes = len(text[: starts.pop()].encode("utf-8")), self.sizes[list(tail)]
        ends = np.cumsum(sizes)
        word = int(np.searchsorted(ends, at, side="right"))
        began = self._encoded([text + _KINDS[kind][1][0]])[0][:word]
        if at != (ends[word - 1] if word else 0) or began != [*tail[:word]]:
            return None
        own, rest = self.follows((), candidates), tail[word:]
        if not rest or not own.any():
            return own
        if not self._merges.sure[list(rest)].all():
            return None
        if not all(self._merges.apart(a, np.array([b]))[0] for a, b in itertools.pairwise(rest)):
            return np.zeros(len(candidates), bool)
        own[own] = self._merges.apart(rest[-1], candidates[own])
        return own

    def _kept(self, tail: tuple[int, ...], candidates: np.ndarray) -> np.ndarray:
        """bool [n]: candidates for which the tail and the candidate are what their text is cut into."""
        before, out = self.text(tail), np.zeros(len(candidates), bool)
        texts: dict[int, str] = {}
        for place, i in enumerate(candidates.tolist()):
            data = before + self.view.pieces[i]
            try:
                text = data.decode("utf-8") if self._splits else ""
            except UnicodeDecodeError:
                text = ""
            if text:
                texts[place] = text
            else:
                out[place] = self.view.cut(data) == [*tail, i]
        for probe in ("", *_AFTER_SPACE):
            left = [at for at, text in texts.items() if not out[at] and (not probe or text[-1].isspace())]
            for at, ids in zip(left, self._encoded([texts[at] + probe for at in left])):
                begins = ids[: len(tail) + 1] == [*tail, candidates[at]]
                out[at] = begins and (bool(probe) or len(ids) == len(tail) + 1)
        return out

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with complaint(f"{self.view.name}: tokenizer.json cannot encode a text of its own tokens"):
            found = self._tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]
