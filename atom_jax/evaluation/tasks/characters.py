"""Questions about the letters of words, which models over bytes see and models over subwords have to remember.

Made, not fetched: operations like those of CUTE (Edman et al., 2024, arXiv 2409.15452) on words of the built-in
novels, as multiple choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import string
from collections.abc import Callable

import numpy as np

from atom_jax import config
from atom_jax.data.builtin import austen
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import choice, requests
from atom_jax.evaluation.tasks.task import Plan
from atom_jax.typing import AtomError

# Answers per question.
CHOICES = 4
_WORD = re.compile(r"\b[a-z]{5,9}\b")


@dataclasses.dataclass(frozen=True)
class CharacterSettings:
    """documents: questions of each kind, drawn with `seed`. shots: answered ones before each. kinds: see `KINDS`."""

    documents: int = 200
    seed: int = 0
    shots: int = 4
    kinds: tuple[str, ...] = ("spelling", "reversal", "deletion", "insertion", "substitution", "swap")

    def __post_init__(self):
        count = (0, 2**31 - 1)
        config.check(self, documents=(1, 2**31 - 1), seed=count, shots=count)
        for kind in self.kinds or ("",):
            if kind not in KINDS:
                raise AtomError(f"characters.kinds: no kind {kind!r}; expected some of {', '.join(KINDS)}")


def _spelling(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Spell "{word}".', " ".join(word)


def _reversal(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Write "{word}" backwards.', word[::-1]


def _deletion(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Delete every "{a}" in "{word}".', word.replace(a, "")


def _insertion(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Add "{b}" after every "{a}" in "{word}".', word.replace(a, a + b)


def _substitution(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Replace every "{a}" with "{b}" in "{word}".', word.replace(a, b)


def _swap(word: str, a: str, b: str) -> tuple[str, str]:
    return f'Swap the first and the last letter of "{word}".', word[-1] + word[1:-1] + word[0]


# (word, a letter of it, another one) to a question and its answer.
KINDS: dict[str, Callable[[str, str, str], tuple[str, str]]] = {
    "spelling": _spelling,
    "reversal": _reversal,
    "deletion": _deletion,
    "insertion": _insertion,
    "substitution": _substitution,
    "swap": _swap,
}


@dataclasses.dataclass(frozen=True)
class Characters:
    """acc as of `choice.Choice`, over all kinds and as acc_KIND of each. Wrong answers are the right one with two
    letters next to each other exchanged, or with another letter somewhere."""

    settings = CharacterSettings()

    def plan(self, settings: CharacterSettings, encoder: Encoder) -> Plan:
        """The items of all questions."""
        documents = questions(settings)
        n = settings.documents
        parts = {kind: slice(i * n, (i + 1) * n) for i, kind in enumerate(settings.kinds)}
        return choice.compare(documents, encoder, {"shots": settings.shots}, parts)


def questions(settings: CharacterSettings) -> list[requests.Request]:
    """`documents` questions of each kind, one kind after the other; the same for the same settings."""
    words, out = _words(), []
    for kind in settings.kinds:
        rng = np.random.default_rng([settings.seed, *kind.encode()])
        drawn = rng.permutation(words)[: settings.documents + settings.shots]
        if len(drawn) < settings.documents + settings.shots:
            asked = f"{settings.documents} and {settings.shots}"
            raise AtomError(f"characters.documents and shots: there are {len(words)} words, got {asked}")
        made = [_question(kind, str(word), rng) for word in drawn]
        shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in made[: settings.shots])
        for question, answer in made[settings.shots :]:
            answers = [answer, *_wrong(answer, rng)]
            order = rng.permutation(CHOICES)
            context = f"{shown}Question: {question}\nAnswer:"
            ordered = tuple(f" {answers[i]}" for i in order)
            out.append(requests.Request(len(out), (context,) * CHOICES, ordered, int(np.argmin(order))))
    return out


def _words() -> list[str]:
    """Words of 5 to 9 small letters in the novels that models train on, in alphabetical order."""
    corpus = austen("train")
    return sorted({w for i in range(len(corpus)) for w in _WORD.findall(corpus.read(i).decode("utf-8"))})


def _question(kind: str, word: str, rng: np.random.Generator) -> tuple[str, str]:
    others = [c for c in string.ascii_lowercase if c not in word]
    return KINDS[kind](word, str(rng.choice(list(word))), str(rng.choice(others)))


def _wrong(answer: str, rng: np.random.Generator) -> list[str]:
    """Answers that are not this one, and differ from each other."""
    letters = [i for i, c in enumerate(answer) if c != " "]
    pairs = [(i, j) for i, j in itertools.pairwise(letters) if answer[i] != answer[j]]
    out: list[str] = []
    while len(out) < CHOICES - 1:
        new = list(answer)
        if pairs and rng.random() < 0.5:
            i, j = pairs[rng.integers(len(pairs))]
            new[i], new[j] = new[j], new[i]
        else:
            new[letters[rng.integers(len(letters))]] = str(rng.choice(list(string.ascii_lowercase)))
        text = "".join(new)
        if text != answer and text not in out:
            out.append(text)
    return out
