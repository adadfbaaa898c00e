"""What a puzzle offers, and the corpus that it generates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from atom_jax.data.corpus import crc_of

SPLITS = ("train", "validation", "test")
DOCUMENTS = 2**20
_SAMPLE = 32


class Step(NamedTuple):
    """A symbol of a chain of reasoning: its kind, and whether chance decides about it."""

    kind: str
    free: bool


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """Base of all puzzles: frozen configurations, whose fields say how hard they are.

    Problems are any hashable values. Prompts, chains and answers are words with a blank between them; a prompt ends
    with the word `END`, a document is a prompt, a blank and a chain.
    """

    name: ClassVar[str] = ""
    END: ClassVar[str] = ""

    def problem(self, rng: np.random.Generator, split: str = "all") -> Any:
        """A problem of a split ("train", "validation", "test", or "all")."""
        raise NotImplementedError

    def prompt(self, problem: Any) -> str:
        """The problem in words."""
        raise NotImplementedError

    def read(self, prompt: str) -> Any:
        """The problem of a prompt (`END` may be missing). AtomError for what is none."""
        raise NotImplementedError

    def chain(self, problem: Any, rng: np.random.Generator) -> str:
        """Reasoning that ends with the answer, by a search that tosses coins."""
        raise NotImplementedError

    def answer(self, chain: str) -> str | None:
        """The answer at the end of a chain, or None where it has not come to one."""
        raise NotImplementedError

    def solves(self, problem: Any, answer: str) -> bool:
        """Whether the answer is right."""
        raise NotImplementedError

    def steps(self, chain: str) -> list[Step]:
        """Of what kind every word of a chain is."""
        raise NotImplementedError

    def dead(self, words: Sequence[str]) -> list[bool]:
        """Words of a prompt and a chain that what follows can do without."""
        raise NotImplementedError


class Generated:
    """Documents of a puzzle, made when asked for: a `data.corpus.Corpus` of DOCUMENTS of them.

    Document i is drawn with a counter-based generator of (the puzzle's name, the split, i), so that it is the same
    wherever it is read.
    """

    sizes = None
    endless = True

    def __init__(self, puzzle: Puzzle, split: str):
        self.puzzle, self.split, self.what = puzzle, split, f"reason:{puzzle.name}"

    @functools.cached_property
    def crc(self) -> int:
        return crc_of([repr(self.puzzle).encode(), *map(self.read, range(_SAMPLE))])

    def __len__(self) -> int:
        return DOCUMENTS

    def pose(self, i: int) -> tuple[Any, np.random.Generator]:
        """Problem i, and the generator with which its chain is drawn."""
        number = ("all", *SPLITS).index(self.split)
        rng = np.random.Generator(np.random.Philox(key=[number, i]))
        return self.puzzle.problem(rng, self.split), rng

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """As of a Corpus."""
        problem, rng = self.pose(i)
        text = f"{self.puzzle.prompt(problem)} {self.puzzle.chain(problem, rng)}"
        return text.encode()[start:stop]
