"""Documents in which facts are planted and asked for later: a model that has forgotten them cannot answer."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence

import numpy as np

from atom_jax import config
from atom_jax.data.config import SPLITS
from atom_jax.data.corpus import Corpus, crc_of
from atom_jax.data.facts.kinds import Fact, drawn, sentence_ends, woven
from atom_jax.data.facts.tables import KINDS
from atom_jax.data.facts.things import OTHERS
from atom_jax.data.pieces import cut
from atom_jax.typing import AtomError

DOCUMENTS = 2**20
# Bytes that a fact may take with its question: tests/data/test_facts.py has the longest.
ROOM = 320
_SAMPLE = 32
# Where text begins and ends is moved to the end of a sentence within so many bytes.
_REACH = 256
# Documents of the source that one document may be made of.
_MOST = 1000
# What stands before a question, and between it and the words that lead to its answer.
_LAYOUTS = ((" ", "? "), ("\n", "? "), ("\nQ: ", "?\nA: "))
# Sources whose documents are not running text.
_OTHER = ("facts:", "reason:", "image:", "labelled:", "env:")


@dataclasses.dataclass(frozen=True)
class Facts:
    """size: bytes of a document at most; it has hardly fewer. facts: planted in each, of which half or more are asked
    for. gap: bytes at least between a fact and its question. weight: so many times the tokens of answers count in the
    loss. seed: of everything drawn."""

    size: int = 6000
    facts: int = 8
    gap: int = 1000
    weight: float = 20.0
    seed: int = 0

    def __post_init__(self):
        some = (1, 2**24)
        config.check(self, size=some, facts=some, gap=(0, 2**24), weight=(1e-6, 1e6), seed=(0, 2**31 - 1))
        if self.size < (least := self.gap + _REACH + ROOM * self.facts):
            raise AtomError(f"size is {self.size}: a gap of {self.gap} and facts={self.facts} need {least} bytes")


def parse(text: str) -> tuple[str, Facts]:
    """The source of the running text and the facts that "SOURCE:facts=4:gap=2000" names.

    Raises AtomError for sources of other than running text, an unknown field or an unreadable value.
    """
    source, options = re.fullmatch(r"(.*?)((?::\w+=[^:]*)*)", text, re.DOTALL).groups()
    if not source or source.startswith(_OTHER):
        raise AtomError(f"facts:{text}: expected a source of running text, such as facts:austen")
    running, _, last = source.rpartition(":")
    if running and difflib.get_close_matches(last, [field.name for field in dataclasses.fields(Facts)], 1):
        raise AtomError(f"facts:{text}: {last!r}: expected NAME=VALUE, such as {running}:size=6000")
    return source, config.build(Facts, options.split(":")[1:], f"facts:{source}:")


class Asking:
    """Running text with facts and, at the end, questions about a random part of them with their answers: a
    `data.corpus.Corpus` of DOCUMENTS documents.

    Document i is drawn with a counter-based generator of (seed, the text of the source, split, i): a passage from
    anywhere in the split of the source, which goes on with the next document where one ends; facts of `tables.KINDS`,
    where sentences end; questions in a random order and layout.
    """

    sizes = None
    endless = True

    def __init__(self, how: Facts, running: Corpus, split: str):
        """running: the documents of the same split of the source."""
        self.how, self.running, self.split, self.what = how, running, split, f"facts:{running.what}"
        self.ends = None if running.sizes is None else np.cumsum(running.sizes)
        if self.ends is not None and self.ends[-1] < how.size + 2 * _REACH:
            raise AtomError(
                f"{self.what} has {self.ends[-1]} bytes in its {split} split, too few for documents of {how.size}"
            )

    @functools.cached_property
    def crc(self) -> int:
        known = f"{self.how} {self.running.crc}".encode()
        return crc_of([known, *map(self.read, range(_SAMPLE))])

    def __len__(self) -> int:
        return DOCUMENTS

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """As of a Corpus."""
        return self.marked(i)["text"][start:stop]

    def marked(self, i: int) -> dict:
        """Document i, {"text": bytes, "answers": i64 [n, 2], "weight": float}: where its answers begin and end, in
        bytes, and how many times their tokens count."""
        how, draw = self.how, self._generator(i)
        facts = drawn(KINDS, OTHERS, draw.permutation(list(KINDS))[: how.facts].tolist(), how.facts, draw)
        asked = [facts[k] for k in draw.permutation(how.facts)[: draw.integers(-(-how.facts // 2), how.facts + 1)]]
        layout = _LAYOUTS[draw.integers(len(_LAYOUTS))]
        parts = [_asked(fact, layout) for fact in asked]
        taken = sum(len(x) for fact in facts for x in (fact.sentence, fact.earlier)) + sum(map(len, sum(parts, ())))
        text = self._planted(facts, self._passage(how.size - taken, draw), draw)
        answers = []
        for question, answer, after in parts:
            start = len(text) + len(question)
            answers.append((start, start + len(answer)))
            text += question + answer + after
        return {"text": text, "answers": np.array(answers, np.int64), "weight": how.weight}

    def _generator(self, i: int) -> np.random.Generator:
        key = np.array([self.how.seed + (self.running.crc << 32), SPLITS.index(self.split)], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, i]))

    def _planted(self, facts: Sequence[Fact], text: bytes, draw: np.random.Generator) -> bytes:
        """A passage with the facts in it, the gap kept free at its end."""
        ends = np.flatnonzero(sentence_ends(text)[: max(len(text) - self.how.gap, 0) + 1])
        places = ends if len(ends) else np.zeros(1, np.int64)
        todo = []
        for fact in facts:
            k = draw.integers(len(places))
            todo.append((places[k], 1, fact.sentence.encode()))
            if fact.earlier:
                todo.append((places[draw.integers(k + 1)], 0, fact.earlier.encode()))
        todo.sort(key=lambda one: one[:2])
        return b"".join(woven(text, [(place, what) for place, _, what in todo]))

    def _passage(self, n: int, draw: np.random.Generator) -> bytes:
        """About n bytes of running text, no more, from the end of a sentence to that of another where there are."""
        document, start = self._place(draw)
        found = b""
        for k in range(min(len(self.running) + 1, _MOST)):
            if len(found) >= n + _REACH:
                break
            begin = 0 if k else start
            part = self.running.read((document + k) % len(self.running), begin, begin + n + _REACH)
            found += b"\n\n" * bool(found) + part
        found = found[(_sentence_end(found[:_REACH]) or cut(found[:_REACH])) if start else 0 :]
        if len(found) < n:
            raise AtomError(f"{self.what}: {_MOST} documents have not the {n} bytes of one")
        late = max(n - _REACH, 0)
        return found[: late + (_sentence_end(found[late:n]) or cut(found[late:n]))]

    def _place(self, draw: np.random.Generator) -> tuple[int, int]:
        """A document of the source, and a byte of it."""
        if self.ends is None:
            document = int(draw.integers(len(self.running)))
            return document, int(draw.integers(max(len(self.running.read(document)), 1)))
        at = int(draw.integers(self.ends[-1]))
        document = int(np.searchsorted(self.ends, at, side="right"))
        return document, at - int(self.ends[document] - self.running.sizes[document])


def _sentence_end(text: bytes) -> int:
    """Where the last sentence in some bytes ends, or 0."""
    found = np.flatnonzero(sentence_ends(text))
    return int(found[-1]) if len(found) else 0


def _asked(fact: Fact, layout: tuple[str, str]) -> tuple[bytes, bytes, bytes]:
    """A question with what leads to its answer, the answer, and what follows it."""
    before, between = layout
    if "? " not in fact.question:  # a line of code
        question, after = fact.question, "\n"
    else:
        question, after = before + fact.question.strip().replace("? ", between, 1), "."
    return f"{question} ".encode(), fact.answer.encode(), after.encode()
