"""Facts of many kinds and wordings, and where in a running text they are planted.

Whoever plants brings tables of its own: those of `data.facts.tables` are trained on, those of
`evaluation.tasks.planted` never.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from atom_jax.typing import AtomError

_WHITE = [ord(c) for c in string.whitespace]
_STOPS = [ord(c) for c in '.!?"']


class Fact(NamedTuple):
    """sentence: says that something is `answer`, behind the text before it; earlier: a sentence that stands long
    before (it said otherwise, or says whom this one is about), or "". question: after which the answer follows."""

    kind: str
    sentence: str
    question: str
    answer: str
    earlier: str = ""


class Wording(NamedTuple):
    """How a fact about {s} is said, asked for, and what was said long before, if anything. {a}, {b}: two things of
    its kind; {m}: somebody else. answer: what is to be said, as the sentence has it."""

    sentence: str
    question: str
    earlier: str = ""
    answer: str = "{a}"


class Answers(Protocol):
    """What draws two things that facts may say."""

    def two(self, draw: np.random.Generator) -> Sequence[str]: ...


@dataclasses.dataclass(frozen=True)
class Words:
    """Some of these, which differ."""

    words: tuple[str, ...]

    def two(self, draw: np.random.Generator) -> Sequence[str]:
        """See `Answers`."""
        return [self.words[i] for i in draw.permutation(len(self.words))[:2]]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Whole numbers of so many digits."""

    digits: int

    def two(self, draw: np.random.Generator) -> Sequence[str]:
        """See `Answers`."""
        return [str(x) for x in draw.integers(10 ** (self.digits - 1), 10**self.digits, 2)]


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of a form such as "AA-000": every A becomes a capital letter, every 0 a digit."""

    form: str

    def two(self, draw: np.random.Generator) -> Sequence[str]:
        """See `Answers`."""
        return [self._one(draw), self._one(draw)]

    def _one(self, draw: np.random.Generator) -> str:
        places = zip(self.form, draw.integers(0, 2**30, len(self.form)).tolist())
        kinds = {"A": string.ascii_uppercase, "0": string.digits}
        return "".join(kinds[c][x % len(kinds[c])] if c in kinds else c for c, x in places)


class Kind(NamedTuple):
    """Facts of one kind."""

    wordings: tuple[Wording, ...]
    subjects: tuple[str, ...]
    answers: Answers


def listed(text: str) -> tuple[str, ...]:
    """What lies between commas."""
    return tuple(w.strip() for w in text.split(","))


def drawn(
    table: Mapping[str, Kind], others: Sequence[str], kinds: Sequence[str], n: int, draw: np.random.Generator
) -> list[Fact]:
    """n facts, of these kinds of a table in turn ((): of all), no two of one kind about the same subject. others: who
    {m} may be. AtomError for unknown kinds."""
    if unknown := [kind for kind in kinds if kind not in table]:
        raise AtomError(f"kinds: no kind {unknown[0]!r} of facts; expected some of {', '.join(table)}")
    kinds = list(dict.fromkeys(kinds)) or list(table)
    subjects = {kind: draw.permutation(len(table[kind].subjects)) for kind in kinds}
    order = draw.permutation(len(others))
    out = []
    for i in range(n):
        name, number = kinds[i % len(kinds)], i // len(kinds)
        kind = table[name]
        met = any("{m}" in text for wording in kind.wordings for text in wording)
        most = min(len(kind.subjects), len(others)) if met else len(kind.subjects)
        if number >= most:
            raise AtomError(f"facts: there are no more than {most} of kind {name}")
        wording = kind.wordings[draw.integers(len(kind.wordings))]
        a, b = kind.answers.two(draw)
        said = {
            "s": kind.subjects[subjects[name][number]],
            "a": a,
            "b": b,
            "m": others[order[number % len(others)]],
        }
        sentence, question, earlier, answer = (text.format(**said) for text in wording)
        out.append(Fact(name, sentence, question, answer, earlier))
    return [out[i] for i in draw.permutation(n)]


def sentence_ends(text: bytes) -> np.ndarray:
    """Whether a sentence or a line ends before each byte of a text, and before its end: bool [n + 1]."""
    data = np.concatenate([np.frombuffer(text, np.uint8), np.zeros(1, np.uint8)])
    before = np.roll(data, 1)
    found = np.isin(data, _WHITE) & (np.isin(before, _STOPS) | (before == ord("\n")))
    found[0] = False
    return found


def nearest(places: np.ndarray, at: float) -> int:
    """That of some places, i64 [n], which is nearest to `at`."""
    return int(places[np.argmin(np.abs(places - at))])


def woven(text: Any, planted: Iterable[tuple[int, Any]]) -> list[Any]:
    """The parts of a text (anything with slices) and what is planted in it: (before which element, what) each, in
    order. Parts 1, 3, ... are those that were planted."""
    parts, cut = [], 0
    for place, what in planted:
        parts += [text[cut:place], what]
        cut = place
    return [*parts, text[cut:]]
