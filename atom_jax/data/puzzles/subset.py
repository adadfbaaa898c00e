"""Subset sum by backtracking: which of some numbers add up to a goal?

    a 10 b 18 c 15 d 11 e 7 f 22 goal 62 ; a- 62 b+ 44 c- 44 d+ 33 ... = a: 0 b: 1 c: 1 d: 0 e: 1 f: 1

A chain is a depth-first search with private coins. Going down at a letter whose number exceeds the remainder the skip
is forced, `a.`; else a coin says whether the number is taken first, `a+`, or skipped first, `a-`; the remainder
follows. Where the letters end before the remainder is 0, `!`, the search walks up: a letter that has been seen from
both sides gives its capital, `A`, and the first other one is turned over, `am` (skipped, after `a+`) or `ap` (taken,
after `a-`), and its remainder. So all that a step needs is the prompt, the latest mark of every letter and what was
written last; everything else is garbage, which lies anywhere in the chain.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from atom_jax import config
from atom_jax.data.puzzles.puzzle import SPLITS, Puzzle, Step
from atom_jax.typing import AtomError

LETTERS = "abcdefgh"
_TRIES, _AT_ONCE = 100_000, 64


class Problem(NamedTuple):
    """Numbers, one for each letter, of which exactly one subset adds up to `goal`."""

    numbers: tuple[int, ...]
    goal: int


@config.register
@dataclasses.dataclass(frozen=True)
class Subset(Puzzle):
    """least, letters: a problem has so many numbers, each count as often. low, high: they are different ones between
    these. goal: most that the goal may be. The numbers to be found are about half of all, one more or fewer.

    A problem belongs to a split by a hash of its numbers and its goal: 18 of 20 to train, one each to validation and
    test.
    """

    least: int = 3
    letters: int = 8
    low: int = 5
    high: int = 60
    goal: int = 150

    name: ClassVar[str] = "subset"
    END: ClassVar[str] = ";"

    def __post_init__(self):
        most = (1, 999)
        config.check(self, least=(2, len(LETTERS)), letters=(2, len(LETTERS)), low=most, high=most, goal=most)
        if self.least > self.letters:
            raise AtomError(f"reason:subset: least is {self.least}, more than the {self.letters} letters")
        if self.high - self.low + 1 < self.letters or self.goal < 2 * self.high:
            raise AtomError("reason:subset: expected as many numbers from low to high as letters, and 2 high <= goal")

    def problem(self, rng: np.random.Generator, split: str = "all") -> Problem:
        """See `Puzzle.problem`."""
        n = int(rng.integers(self.least, self.letters + 1))
        every = np.arange(self.low, self.high + 1, dtype=np.float32)
        for _ in range(0, _TRIES, _AT_ONCE):
            k = int(rng.integers(max(1, n // 2 - 1), n // 2 + 2))
            # In a random order; the first k are those to be found.
            drawn = rng.permuted(np.tile(every, (_AT_ONCE, 1)), axis=1)[:, :n]
            goals = drawn[:, :k].sum(1)
            unique = (drawn @ _choices(n).T == goals[:, None]).sum(1) == 1
            for numbers, goal in zip(drawn[unique & (goals <= self.goal)], goals[unique & (goals <= self.goal)]):
                found = Problem(tuple(rng.permutation(numbers).astype(int).tolist()), int(goal))
                if split in ("all", _split(found)):
                    return found
        raise AtomError(f"reason:subset: {_TRIES} tries gave no problem with one solution; make it easier")

    def prompt(self, problem: Problem) -> str:
        """See `Puzzle.prompt`."""
        pairs = [f"{letter} {number}" for letter, number in zip(LETTERS, problem.numbers)]
        return " ".join([*pairs, "goal", str(problem.goal), self.END])

    def read(self, prompt: str) -> Problem:
        """See `Puzzle.read`."""
        words = prompt.split()
        words = words[:-1] if words[-1:] == [self.END] else words
        n = len(words) // 2 - 1
        names = [*LETTERS[: max(n, 0)], "goal"]
        if len(words) % 2 or words[::2] != names or not all(w.isdecimal() and len(w) < 4 for w in words[1::2]):
            raise AtomError(f"expected a problem such as 'a 10 b 18 c 15 goal 28', got {prompt!r}")
        *numbers, goal = map(int, words[1::2])
        return Problem(tuple(numbers), goal)

    def chain(self, problem: Problem, rng: np.random.Generator) -> str:
        """See `Puzzle.chain`."""
        numbers, n = problem.numbers, len(problem.numbers)
        out: list[str] = []
        # Of every letter down to here: its mark, and the remainder before it.
        marks: list[tuple[str, int]] = []
        rest = problem.goal

        def down(mark: str, before: int) -> int:
            i = len(marks)
            marks.append((mark, before))
            after = before - numbers[i] if mark in "+p" else before
            out.extend((LETTERS[i] + mark, str(after)))
            return after

        while rest:
            i = len(marks)
            if i < n:
                forced = numbers[i] > rest
                rest = down("." if forced else "-+"[int(rng.integers(2))], rest)
                continue
            out.append("!")
            while marks[-1][0] in ".mp":
                marks.pop()
                out.append(LETTERS[len(marks)].upper())
            mark, before = marks.pop()
            rest = down("m" if mark == "+" else "p", before)
        bits = ["1" if i < len(marks) and marks[i][0] in "+p" else "0" for i in range(n)]
        return " ".join([*out, "=", *(f"{letter}: {bit}" for letter, bit in zip(LETTERS, bits))])

    def answer(self, chain: str) -> str | None:
        """See `Puzzle.answer`."""
        _, equals, said = chain.rpartition("= ")
        words = said.split()
        whole = equals and words and words[::2] == [f"{x}:" for x in LETTERS[: len(words) // 2]]
        return " ".join(words) if whole and set(words[1::2]) <= {"0", "1"} else None

    def solves(self, problem: Problem, answer: str) -> bool:
        """See `Puzzle.solves`."""
        bits = answer.split()[1::2]
        taken = sum(x for x, bit in zip(problem.numbers, bits) if bit == "1")
        return len(bits) == len(problem.numbers) and taken == problem.goal

    def steps(self, chain: str) -> list[Step]:
        """Marks, remainders after a number that was taken, after a skip, after a turn to one of these, dead ends,
        capitals, and answers. The coin between `+` and `-` is free."""
        out, kind = [], ""
        for word in chain.split():
            if word.isdecimal():
                out.append(Step(kind, False))
            elif word[0] in LETTERS and word[1:] in (*"+-.mp", ":"):
                name = {"+": "take", "p": "turn to take", "m": "turn to skip", ":": "answer"}.get(word[1:], "skip")
                out.append(Step("answer" if name == "answer" else "mark", word[1:] in "+-"))
                kind = name
            else:
                out.append(Step({"!": "dead end", "=": "answer"}.get(word, "capital"), False))
        return out

    def dead(self, words: Sequence[str]) -> list[bool]:
        """Marks of letters that are marked again later, with their remainders, dead ends and capitals."""
        out, seen = [False] * len(words), set()
        begin = list(words).index(self.END) + 1 if self.END in words else len(words)
        for i in reversed(range(begin, len(words))):
            word = words[i]
            if word[0] in LETTERS and word[1:] != ":":
                out[i] = word[0] in seen
                if out[i] and i + 1 < len(words):
                    out[i + 1] = True
                seen.add(word[0])
            elif word[0].lower() in LETTERS and word.isupper():
                out[i] = True
                seen.add(word.lower())
            elif word == "!":
                out[i] = True
        return out


@functools.cache
def _choices(n: int) -> np.ndarray:
    """All subsets of n things, f32 [2^n, n]."""
    return (np.arange(2**n)[:, None] >> np.arange(n)[None] & 1).astype(np.float32)


def _split(problem: Problem) -> str:
    digest = hashlib.sha256(f"{sorted(problem.numbers)} {problem.goal}".encode()).digest()
    return {0: SPLITS[1], 1: SPLITS[2]}.get(int.from_bytes(digest[:8], "little") % 20, SPLITS[0])
