"""Facts of many kinds and wordings, planted in a running text, and questions about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.typing import AtomError


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


class Kind(NamedTuple):
    """wordings; subjects; answers, () for numbers of `digits` digits."""

    wordings: tuple[Wording, ...]
    subjects: tuple[str, ...]
    answers: tuple[str, ...] = ()
    digits: int = 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(w.strip() for w in text.split(","))


_PEOPLE = _words(
    "Mr. Harlow, Mrs. Penrose, Captain Blythe, Miss Tarrant, Dr. Whitlock, Lady Ashcombe, Mr. Quill, Mrs. Sandford,"
    " Major Thornbury, Miss Vickers, Mr. Oakley, Mrs. Rawdon, Colonel Marsh, Miss Ferrier, Mr. Yarrow, Mrs. Bexley,"
    " Sir Edmund Hale, Miss Larkin, Mr. Drury, Mrs. Winslow, Mr. Ingram, Miss Corbet, Mr. Stroud, Mrs. Fane"
)
_CITIES = _words(
    "Aarhus, Bergen, Cordoba, Durban, Edinburgh, Florence, Geneva, Havana, Istanbul, Jaipur, Kyoto, Lisbon, Montreal,"
    " Nairobi, Oslo, Prague, Quito, Riga, Santiago, Tunis, Utrecht, Vienna, Warsaw, Zagreb"
)
_THINGS = _words(
    "boiler, lathe, loom, pump, furnace, printing press, crane, kiln, mill, winch, scale, compass, lantern, clock,"
    " telescope, harrow, plough, anvil, bellows, still, press, oven, saw, drill"
)
_OTHERS = _words(
    "Tobias Crane, Hester Lowe, Jonas Pike, Abigail Snow, Silas Webb, Martha Kemp, Rufus Dale, Edith Nash,"
    " Caleb Frost, Ursula Bird, Amos Reed, Clara Holt, Giles Park, Nora Finch, Enoch Wade, Phoebe Lunt"
)
_ANIMALS = _words("Biscuit, Pepper, Tansy, Bramble, Comet, Velvet, Nutmeg, Rascal, Thistle, Juniper, Marble, Sable")
_COLOURS = _words("green, yellow, purple, scarlet, orange, grey, violet, brown, crimson, silver, turquoise, pink")
_TRADES = _words("a tailor, a surgeon, a printer, a baker, a joiner, a glazier, a cooper, a saddler, a brewer")
_HOURS = _words("half past seven, a quarter to nine, noon, six o'clock, a quarter past eight, midnight")
_COUNTS = _words("seventeen, forty, ninety-two, thirteen, sixty-four, twenty-nine, eleven, fifty-six, eighty")
_SECRETS = _words("walnut, harbour, lantern, feather, orchard, thunder, pebble, copper, meadow, candle, falcon")

KINDS = {
    "number": Kind(
        (
            Wording(" The secret number of {s} is {a}.",
                    " What is the secret number of {s}? The secret number of {s} is"),
            Wording(" Remember that {a} is the number that belongs to {s}.",
                    " Which number belongs to {s}? The number is"),
        ), _CITIES, digits=7,
    ),
    "pet": Kind(
        (
            Wording(" The dog of {s} was called {a}.", " What was the dog of {s} called? The dog was called"),
            Wording(" {s} had a cat, and its name was {a}.", " What was the name of {s}'s cat? Its name was"),
        ), _PEOPLE, _ANIMALS,
    ),
    "place": Kind(
        (
            Wording(" {s} had spent the whole winter in {a}.", " Where had {s} spent the winter? It was in"),
            Wording(" Every letter to {s} was to be sent to {a}.", " Where did letters to {s} go? They were sent to"),
        ), _PEOPLE, _CITIES,
    ),
    "trade": Kind(
        (Wording(" The father of {s} had been {a}.", " What had the father of {s} been? He had been"),),
        _PEOPLE, _TRADES,
    ),
    "colour": Kind(
        (
            Wording(" The door of {s}'s house was painted {a}.",
                    " What colour was the door of {s}'s house? The door was"),
            Wording(" At the ball {s} wore {a} gloves.", " Of what colour were the gloves of {s}? They were"),
        ), _PEOPLE, _COLOURS,
    ),
    "time": Kind(
        (Wording(" {s} was expected to arrive at {a}.", " When was {s} expected to arrive? At"),), _PEOPLE, _HOURS,
    ),
    "quantity": Kind(
        (Wording(" {s} owned exactly {a} silver spoons.", " How many silver spoons did {s} own? Exactly"),),
        _PEOPLE, _COUNTS,
    ),
    "update": Kind(
        (
            Wording(" The password of {s} was then changed to {a}.", " What is the password of {s} now? It is",
                    " The password of {s} was {b}."),
        ), _PEOPLE, _SECRETS,
    ),
    "values": Kind(
        (
            Wording(" The two colours of {s}'s flag are {a} and {b}.",
                    " What are the two colours of {s}'s flag? The two colours are", answer="{a} and {b}"),
        ), _PEOPLE, _COLOURS,
    ),
    "chain": Kind(
        (
            Wording(" {m} had moved to {a}.", " To which city had the tutor of {s} moved? The tutor had moved to",
                    " The tutor of {s} was {m}."),
        ), _PEOPLE, _CITIES,
    ),
    "manual": Kind(
        (Wording(" To start the {s}, turn the {a} wheel.", " Which wheel starts the {s}? Turn the"),),
        _THINGS, _COLOURS,
    ),
    "dialogue": Kind(
        (
            Wording(' "I keep the key under the {a}," whispered {s}.',
                    " Where did {s} keep the key? Under the"),
        ), _PEOPLE, _THINGS,
    ),
    "code": Kind(
        (Wording("\nsettings['{s}'] = {a}\n", "\nWhat is settings['{s}']? settings['{s}'] ="),), _SECRETS, digits=4,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stream:
    """ids: i32 [t]. wanted: bool [t], tokens of answers. at: i32 [n], where each fact's sentence begins."""

    ids: np.ndarray
    wanted: np.ndarray
    facts: tuple[Fact, ...]
    at: np.ndarray


def facts(kinds: Sequence[str], n: int, draw: np.random.Generator) -> list[Fact]:
    """n facts, of these kinds in turn, no two of one kind about the same subject. AtomError for unknown kinds."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise AtomError(f"kinds: no kind {unknown[0]!r} of facts; expected some of {', '.join(KINDS)}")
    kinds = list(dict.fromkeys(kinds)) or list(KINDS)
    subjects = {kind: draw.permutation(len(KINDS[kind].subjects)) for kind in kinds}
    others = draw.permutation(len(_OTHERS))
    out = []
    for i in range(n):
        name, number = kinds[i % len(kinds)], i // len(kinds)
        kind = KINDS[name]
        most = min(len(kind.subjects), len(_OTHERS)) if name == "chain" else len(kind.subjects)
        if number >= most:
            raise AtomError(f"facts: there are no more than {most} of kind {name}")
        wording = kind.wordings[draw.integers(len(kind.wordings))]
        if kind.digits:
            a, b = (str(x) for x in draw.integers(10 ** (kind.digits - 1), 10**kind.digits, 2))
        else:
            a, b = (kind.answers[j] for j in draw.permutation(len(kind.answers))[:2])
        said = {
            "s": kind.subjects[subjects[name][number]],
            "a": a,
            "b": b,
            "m": _OTHERS[others[number % len(others)]],
        }
        sentence, question, earlier, answer = (text.format(**said) for text in wording)
        out.append(Fact(name, sentence, question, answer, earlier))
    return [out[i] for i in draw.permutation(n)]


def plant(hay: Haystack, chosen: Sequence[Fact], tokens: int, encoder: Encoder) -> Stream:
    """The beginning of a text, `tokens` in all, with the facts evenly spread over it, where sentences end. AtomError
    where it is too short."""
    pieces = [_piece(fact.sentence, fact.answer, encoder) for fact in chosen]
    before = [_piece(fact.earlier, "", encoder) for fact in chosen]
    n = tokens - sum(len(ids) for ids, _ in (*pieces, *before))
    if n < 2 * len(chosen) or len(hay.ids) < n:
        raise AtomError(f"tokens: {len(chosen)} facts in {tokens} tokens of a text that has {len(hay.ids)}")
    ends = np.append(np.flatnonzero(hay.ends[:n]), n)
    places = [ends[np.argmin(np.abs(ends - x))] for x in np.linspace(0.02, 0.98, len(chosen)) * n]
    todo = [(place, i, piece) for i, (place, piece) in enumerate(zip(places, pieces))]
    # What was said before stands half as far into the text.
    todo += [(ends[np.argmin(np.abs(ends - place / 2))], -1, piece) for place, piece in zip(places, before)]
    ids, wanted, at, cut = [], [], np.zeros(len(chosen), np.int32), 0
    for place, i, (new, answer) in sorted(todo, key=lambda one: (one[0], one[1])):
        ids.append(hay.ids[cut:place])
        wanted.append(np.zeros(place - cut, bool))
        if i >= 0:
            at[i] = sum(map(len, ids))
        ids.append(new)
        wanted.append(answer)
        cut = place
    ids.append(hay.ids[cut:n])
    wanted.append(np.zeros(n - cut, bool))
    return Stream(np.concatenate(ids).astype(np.int32), np.concatenate(wanted), tuple(chosen), at)


def asked(fact: Fact, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a question, and of the answer as it follows it."""
    item = dataclasses.replace(encoder, length=1 << 20, always_front=False).pair(fact.question, f" {fact.answer}")
    ids, start = item.items[0]
    return ids[:start].astype(np.int32), ids[start:].astype(np.int32)


def _piece(text: str, answer: str, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a sentence, and bool, which of them say the answer."""
    if not text:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    ids, spans = encoder.tokenizer.spans(text.encode())
    start = len(text[: text.index(answer)].encode()) if answer else 0
    end = start + len(answer.encode())
    return np.asarray(ids, np.int32), (spans[:, 0] < end) & (spans[:, 1] > start)
