"""A needle in a haystack: a sentence with a number, somewhere in a novel, and a question about it at the end."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from atom_jax.data.facts.kinds import sentence_ends
from atom_jax.evaluation.encode import Encoder, front
from atom_jax.typing import AtomError

_CITIES = (
    "Aarhus", "Bergen", "Cordoba", "Durban", "Edinburgh", "Florence", "Geneva", "Havana", "Istanbul", "Jaipur",
    "Kyoto", "Lisbon", "Montreal", "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Santiago", "Tunis", "Utrecht",
    "Vienna", "Warsaw", "Zagreb",
)  # fmt: skip
_SENTENCE = " The secret number of {city} is {number}."
_QUESTION = " What is the secret number of {city}? The secret number of {city} is"
_DIGITS = 7


class Needle(NamedTuple):
    """ids: i32, the context with the question at its end. answer: i32, the number's tokens, as they follow it.
    at: i32 tokens before the sentence with the number. city, number: what it says."""

    ids: np.ndarray
    answer: np.ndarray
    at: int
    city: str
    number: str


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Running text in tokens.

    ids: i32 [n]. ends: bool [n], whether a sentence or a line ends before the token.
    """

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, text: bytes, encoder: Encoder) -> Haystack:
        """The tokens of a text."""
        ids, spans = encoder.tokenizer.spans(text)
        return cls(ids, sentence_ends(text)[spans[:, 0]])


def build(hay: Haystack, encoder: Encoder, length: int, depth: float, seed: tuple[int, ...]) -> Needle:
    """A context of exactly `length` tokens, with the sentence after about `depth` (0 to 1) of the novel's text in it:
    where a sentence of the novel ends, if one does nearby.

    The same arguments give the same needle. Raises AtomError when `length` has no room for it, or the text is too
    short.
    """
    draw = np.random.default_rng(seed)
    city = _CITIES[draw.integers(len(_CITIES))]
    number = str(draw.integers(10 ** (_DIGITS - 1), 10**_DIGITS))
    sentence = encoder.tokenizer.encode(_SENTENCE.format(city=city, number=number))
    asked = dataclasses.replace(encoder, length=1 << 20, always_front=False)
    item = asked.pair(_QUESTION.format(city=city), f" {number}").items[0]
    question, answer = item.ids[: item.start], item.ids[item.start :]
    first = np.array(front(encoder.tokenizer) if encoder.always_front else [], np.int32)
    n = length - len(first) - len(sentence) - len(question)
    if n < 1:
        raise AtomError(f"kv.lengths: {length} tokens have no room for a needle, which takes {length - n}")
    if len(hay.ids) < n:
        raise AtomError(f"kv.lengths: the text has {len(hay.ids)} tokens, a needle of {length} needs {n}")
    start = int(draw.integers(len(hay.ids) - n + 1))
    cut = _near(hay.ends[start : start + n], round(depth * n))
    parts = [first, hay.ids[start : start + cut], sentence, hay.ids[start + cut : start + n], question]
    return Needle(np.concatenate(parts).astype(np.int32), answer.astype(np.int32), len(first) + cut, city, number)


def _near(ends: np.ndarray, at: int) -> int:
    """The place nearest to `at` before which a sentence ends, if it is within a tenth of the text; else `at`."""
    places = np.flatnonzero(ends)
    if not len(places):
        return at
    best = int(places[np.argmin(np.abs(places - at))])
    return best if abs(best - at) <= len(ends) // 10 else at
