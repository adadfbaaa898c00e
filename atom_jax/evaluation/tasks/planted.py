"""Facts of many kinds and wordings, planted in a running text, and questions about them: none that `data.facts` has
trained a model to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from atom_jax.data.facts.kinds import Fact, Kind, Numbers, Wording, Words, drawn, listed, nearest, woven
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.typing import AtomError

_PEOPLE = listed(
    "Mr. Harlow, Mrs. Penrose, Captain Blythe, Miss Tarrant, Dr. Whitlock, Lady Ashcombe, Mr. Quill, Mrs. Sandford,"
    " Major Thornbury, Miss Vickers, Mr. Oakley, Mrs. Rawdon, Colonel Marsh, Miss Ferrier, Mr. Yarrow, Mrs. Bexley,"
    " Sir Edmund Hale, Miss Larkin, Mr. Drury, Mrs. Winslow, Mr. Ingram, Miss Corbet, Mr. Stroud, Mrs. Fane"
)
_CITIES = listed(
    "Aarhus, Bergen, Cordoba, Durban, Edinburgh, Florence, Geneva, Havana, Istanbul, Jaipur, Kyoto, Lisbon, Montreal,"
    " Nairobi, Oslo, Prague, Quito, Riga, Santiago, Tunis, Utrecht, Vienna, Warsaw, Zagreb"
)
# Of these the capitals, and of what.
_CAPITALS = {
    "Edinburgh": "Scotland", "Havana": "Cuba", "Lisbon": "Portugal", "Nairobi": "Kenya", "Oslo": "Norway",
    "Prague": "the Czech Republic", "Quito": "Ecuador", "Riga": "Latvia", "Santiago": "Chile", "Tunis": "Tunisia",
    "Vienna": "Austria", "Warsaw": "Poland", "Zagreb": "Croatia",
}  # fmt: skip
_THINGS = listed(
    "boiler, lathe, loom, pump, furnace, printing press, crane, kiln, mill, winch, scale, compass, lantern, clock,"
    " telescope, harrow, plough, anvil, bellows, still, press, oven, saw, drill"
)
_OTHERS = listed(
    "Tobias Crane, Hester Lowe, Jonas Pike, Abigail Snow, Silas Webb, Martha Kemp, Rufus Dale, Edith Nash,"
    " Caleb Frost, Ursula Bird, Amos Reed, Clara Holt, Giles Park, Nora Finch, Enoch Wade, Phoebe Lunt"
)
_ANIMALS = listed("Biscuit, Pepper, Tansy, Bramble, Comet, Velvet, Nutmeg, Rascal, Thistle, Juniper, Marble, Sable")
_COLOURS = listed("green, yellow, purple, scarlet, orange, grey, violet, brown, crimson, silver, turquoise, pink")
_TRADES = listed("a tailor, a surgeon, a printer, a baker, a joiner, a glazier, a cooper, a saddler, a brewer")
_HOURS = listed("half past seven, a quarter to nine, noon, six o'clock, a quarter past eight, midnight")
_COUNTS = listed("seventeen, forty, ninety-two, thirteen, sixty-four, twenty-nine, eleven, fifty-six, eighty")
_SECRETS = listed("walnut, harbour, lantern, feather, orchard, thunder, pebble, copper, meadow, candle, falcon")

KINDS = {
    "number": Kind(
        (
            Wording(" The secret number of {s} is {a}.",
                    " What is the secret number of {s}? The secret number of {s} is"),
            Wording(" Remember that {a} is the number that belongs to {s}.",
                    " Which number belongs to {s}? The number is"),
        ), _CITIES, Numbers(7),
    ),
    "pet": Kind(
        (
            Wording(" The dog of {s} was called {a}.", " What was the dog of {s} called? The dog was called"),
            Wording(" {s} had a cat, and its name was {a}.", " What was the name of {s}'s cat? Its name was"),
        ), _PEOPLE, Words(_ANIMALS),
    ),
    "place": Kind(
        (
            Wording(" {s} had spent the whole winter in {a}.", " Where had {s} spent the winter? It was in"),
            Wording(" Every letter to {s} was to be sent to {a}.", " Where did letters to {s} go? They were sent to"),
        ), _PEOPLE, Words(_CITIES),
    ),
    "trade": Kind(
        (Wording(" The father of {s} had been {a}.", " What had the father of {s} been? He had been"),),
        _PEOPLE, Words(_TRADES),
    ),
    "colour": Kind(
        (
            Wording(" The door of {s}'s house was painted {a}.",
                    " What colour was the door of {s}'s house? The door was"),
            Wording(" At the ball {s} wore {a} gloves.", " Of what colour were the gloves of {s}? They were"),
        ), _PEOPLE, Words(_COLOURS),
    ),
    "time": Kind(
        (Wording(" {s} was expected to arrive at {a}.", " When was {s} expected to arrive? At"),),
        _PEOPLE, Words(_HOURS),
    ),
    "quantity": Kind(
        (Wording(" {s} owned exactly {a} silver spoons.", " How many silver spoons did {s} own? Exactly"),),
        _PEOPLE, Words(_COUNTS),
    ),
    "update": Kind(
        (
            Wording(" The password of {s} was then changed to {a}.", " What is the password of {s} now? It is",
                    " The password of {s} was {b}."),
        ), _PEOPLE, Words(_SECRETS),
    ),
    "values": Kind(
        (
            Wording(" The two colours of {s}'s flag are {a} and {b}.",
                    " What are the two colours of {s}'s flag? The two colours are", answer="{a} and {b}"),
        ), _PEOPLE, Words(_COLOURS),
    ),
    "chain": Kind(
        (
            Wording(" {m} had moved to {a}.", " To which city had the tutor of {s} moved? The tutor had moved to",
                    " The tutor of {s} was {m}."),
        ), _PEOPLE, Words(_CITIES),
    ),
    "manual": Kind(
        (Wording(" To start the {s}, turn the {a} wheel.", " Which wheel starts the {s}? Turn the"),),
        _THINGS, Words(_COLOURS),
    ),
    "dialogue": Kind(
        (
            Wording(' "I keep the key under the {a}," whispered {s}.',
                    " Where did {s} keep the key? Under the"),
        ), _PEOPLE, Words(_THINGS),
    ),
    "code": Kind(
        (Wording("\nsettings['{s}'] = {a}\n", "\nWhat is settings['{s}']? settings['{s}'] ="),),
        _SECRETS, Numbers(4),
    ),
}  # fmt: skip

# Not among KINDS: the same facts again, asked with other words than they were said in.
OTHER_WORDS = "other_words"
# Tokens that ask for a passage of a text's own, and that follow them.
QUOTED = 16


@dataclasses.dataclass(frozen=True)
class Stream:
    """ids: i32 [t]. said: bool [t], tokens of what was planted; wanted: of the answers alone. at: i32 [n], where each
    fact's sentence begins. ends: i32 [s], where each of the texts ends of which it is made."""

    ids: np.ndarray
    said: np.ndarray
    wanted: np.ndarray
    facts: tuple[Fact, ...]
    at: np.ndarray
    ends: np.ndarray

    @property
    def texts(self) -> list[np.ndarray]:
        """The ids of each of its texts."""
        return np.split(self.ids, self.ends[:-1])


def facts(kinds: Sequence[str], n: int, draw: np.random.Generator) -> list[Fact]:
    """n facts, of these kinds in turn, no two of one kind about the same subject. AtomError for unknown kinds."""
    return drawn(KINDS, _OTHERS, kinds, n, draw)


def plant(hay: Haystack, chosen: Sequence[Fact], tokens: int, encoder: Encoder) -> Stream:
    """As `plant_in_all`, in one text."""
    return plant_in_all([hay], chosen, tokens, encoder)


def plant_in_all(hays: Sequence[Haystack], chosen: Sequence[Fact], tokens: int, encoder: Encoder) -> Stream:
    """The beginnings of texts, of each as much, one after another, `tokens` in all, with the facts evenly spread over
    the whole, where sentences end. AtomError where a text is too short."""
    pieces = [_piece(fact.sentence, fact.answer, encoder) for fact in chosen]
    before = [_piece(fact.earlier, "", encoder) for fact in chosen]
    n = tokens - sum(len(ids) for ids, _ in (*pieces, *before))
    cuts = np.arange(len(hays) + 1) * n // len(hays)
    shares = np.diff(cuts)
    if n < 2 * max(len(chosen), len(hays)) or any(len(hay.ids) < share for hay, share in zip(hays, shares)):
        least = min(len(hay.ids) for hay in hays)
        many = f" of {len(hays)} texts, the shortest of which" if len(hays) > 1 else " of a text that"
        raise AtomError(f"facts: there is no room for {len(chosen)} facts in {tokens} tokens{many} has {least}")
    text = np.concatenate([hay.ids[:share] for hay, share in zip(hays, shares)])
    ends = [cut + np.flatnonzero(hay.ends[:share]) for hay, cut, share in zip(hays, cuts, shares)]
    ends = np.unique(np.concatenate([*ends, cuts[1:]]))
    places = [nearest(ends, x) for x in np.linspace(0.02, 0.98, len(chosen)) * n]
    todo = [(place, i, piece) for i, (place, piece) in enumerate(zip(places, pieces))]
    # What was said before stands half as far into the text.
    todo += [(nearest(ends, place / 2), -1, piece) for place, piece in zip(places, before)]
    todo.sort(key=lambda one: (one[0], one[1]))
    ids = woven(text, [(place, new) for place, _, (new, _) in todo])
    said, wanted = (
        np.concatenate(woven(np.zeros(n, bool), [(place, of(piece)) for place, _, piece in todo]))
        for of in (lambda piece: np.ones(len(piece[0]), bool), lambda piece: piece[1])
    )
    starts = np.cumsum([0, *map(len, ids)])[1:-1:2]
    at = np.zeros(len(chosen), np.int32)
    for start, (_, i, _) in zip(starts, todo):
        if i >= 0:
            at[i] = start
    # What is planted where a text ends belongs to that.
    ends = [cut + sum(len(new) for place, _, (new, _) in todo if place <= cut) for cut in cuts[1:]]
    ids = np.concatenate(ids).astype(np.int32)
    return Stream(ids, said, wanted, tuple(chosen), at, np.array(ends, np.int32))


def quotes(stream: Stream, n: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """n passages of a stream's own, evenly spaced, in which nothing is planted: QUOTED tokens, as many that follow,
    and where they begin. AtomError where there are not so many places."""
    long = 2 * QUOTED
    planted = np.concatenate([[0], np.cumsum(stream.said)])
    starts = np.arange(len(stream.ids) - long + 1)
    text = np.searchsorted(stream.ends, np.arange(len(stream.ids)), side="right")
    free = (planted[starts + long] == planted[starts]) & (text[starts] == text[starts + long - 1])
    places = starts[free]
    if n > len(places):
        raise AtomError(f"lasting.quotes: the text has {len(places)} passages of {long} tokens, not {n}")
    at = places[np.linspace(0, len(places) - 1, n).astype(int)]
    return [(stream.ids[a : a + QUOTED], stream.ids[a + QUOTED : a + long], int(a)) for a in at]


def in_other_words(fact: Fact) -> Fact | None:
    """A fact about the number of a capital, of the kind OTHER_WORDS, with a question that has none of its sentence's
    words that are rare; None for other facts."""
    found = [country for city, country in _CAPITALS.items() if city in fact.sentence and fact.kind == "number"]
    if not found:
        return None
    question = f" Which digits must nobody learn in the capital of {found[0]}? The digits are"
    return fact._replace(kind=OTHER_WORDS, question=question)


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
