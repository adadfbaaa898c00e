"""What lasting memories are compared on and by: streams of texts that are read once, and what each law and score keep
of them."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import kv, lasting_fit, planted
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.kvcache.lasting import score as scores
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.kvcache.lasting.score import LEARNED, SCORES, Linear
from atom_jax.lasting import front as front_lib
from atom_jax.lasting import gate, learned
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.codec import half
from atom_jax.lasting.reader import Reader, State
from atom_jax.lasting.store import FORMAT, KNN, Manifest, Model, Settings
from atom_jax.nn import neighbours
from atom_jax.nn.neighbours import Neighbours
from atom_jax.typing import LM, AtomError

# What a method may have beside entries: nothing, and passages that are read again (and KNN).
NONE, REREAD = "none", "reread"
# Points of a method's growth.
_POINTS = 64


class Method(NamedTuple):
    """A law with a score. law: None for one that keeps no entries. score: its name, or that of its file; file: what
    `Memory.open` takes for it; learned: of a score that is none of SCORES. rereads: passages are put in front of
    questions; mixes: states are mixed into what the model says."""

    name: str
    score: str = ""
    law: Law | None = None
    file: str = ""
    learned: Linear | None = None
    rereads: bool = False
    mixes: bool = False


class Kept(NamedTuple):
    """What a method has of a stream when it is asked.

    lm: the model, with what it mixes in. fronts: what may stand in front of a question. chooses: whether a question
    chooses among it. entries, by_law: per head, those that are there apart from sinks and window, and those that the
    law allows; front: with sinks and window. growth: (tokens that have left the window, entries) as they were met.
    bytes: on disk, None where nothing is. rate: tokens read per second, None where nobody took the time.
    """

    lm: LM
    fronts: gate.Fronts
    chooses: bool
    entries: int
    by_law: int | None
    front: int
    growth: list[tuple[int, int]]
    bytes: int | None
    rate: float | None


def methods(laws: Sequence[str], scores_: Sequence[str], model: str) -> list[Method]:
    """All that are compared, NONE among them: what each of them says is held against it. model: its fingerprint.
    AtomError for unknown laws and scores, and for two of one name, which tables could not tell apart."""
    out = []
    for text in kv.joined(tuple(laws)):
        first, *also = text.split("+")
        first, also = (NONE, [first, *also]) if first in (REREAD, KNN) else (first, also)
        if unknown := [name for name in also if name not in (REREAD, KNN)]:
            raise AtomError(f"lasting.laws: {text!r}: expected {REREAD} or {KNN} behind +, got {unknown[0]!r}")
        law = None if first == NONE else Law.parse(first)
        name = "+".join([*([str(law)] if law is not None else []), *also]) or NONE
        given = [""] if law is None else scores_ if law.alpha < 1 else scores_[:1]
        for score in given:
            file = _shipped(model) if score == LEARNED else score
            fit = None if file in ("", *SCORES) else learned.load(file)
            shown = pathlib.Path(score).name
            out.append(Method(name, shown, law, file, fit, REREAD in also, KNN in also))
    if not out or not scores_:
        raise AtomError("lasting: expected at least one law and score")
    shown = [(method.name, method.score) for method in out]
    if twice := [both for both in shown if shown.count(both) > 1]:
        raise AtomError(
            f"lasting: {' by '.join(filter(None, twice[0]))} is there twice; laws and scores differ by name"
        )
    return out if NONE in (method.name for method in out) else [Method(NONE), *out]


def _shipped(model: str) -> str:
    file = learned.shipped(model)
    if file is None:
        raise AtomError(
            f"lasting.scores: {LEARNED}: no score ships for this model; name a file that fit_memory wrote"
        )
    return str(file)


def stream_of(
    name: str, kinds: Sequence[str], facts: int, tokens: int, draw: Any, encoder: Encoder
) -> planted.Stream:
    """The beginnings of a text, or of several with + between their names, with facts planted over the whole."""
    hays = [Haystack.of(lasting_fit.text_of(part), encoder) for part in names(name)]
    return planted.plant_in_all(hays, planted.facts(kinds, facts, draw), tokens, encoder)


def names(stream: str) -> list[str]:
    """The texts of a stream: novels and files."""
    return [stream] if pathlib.Path(stream).is_file() else stream.split("+")


class Held:
    """A stream that was read here, once for all methods: what they keep of it, and where reading stands."""

    def __init__(
        self, lm: LM, model: Model, stream: planted.Stream, chosen: Sequence[Method], part: int, name: str,
        choice: Choice, how: Neighbours,
    ):  # fmt: skip
        """Reads. how: states are mixed in."""
        self._lm, self._stream, self._choice, self._how = lm, stream, choice, how
        self._blocks = {(m.law, m.file): _empty(m, model) for m in chosen if m.law is not None}
        self._growth = {key: [(0, 0)] for key in self._blocks}
        fits = {m.file: m.learned for m in chosen}
        mixes, x = any(m.mixes for m in chosen), []
        began, state = time.monotonic(), None
        for state, seen in lasting_fit.read(lm, stream.texts, part, name):
            if mixes:
                x.append(np.asarray(state.x_td, np.float32))
            for (law, file), blocks in self._blocks.items() if seen is not None else ():
                score = file if fits[file] is None else scores.LEARNED
                blocks.add(Entries.scored(seen, scores.score(score, seen, fits[file])))
                self._growth[law, file].append((blocks.written, sum(map(len, blocks.all()))))
        self._rate = len(stream.ids) / (time.monotonic() - began)
        self._state: State = state
        self._window = Reader(lm, part, lasting_fit.SINKS).arrays(state)
        self._x = np.concatenate(x) if mixes else None

    @contextlib.contextmanager
    def kept(self, method: Method) -> Iterator[Kept]:
        """What a method, one of those that were named, keeps."""
        blocks = None if method.law is None else self._blocks[method.law, method.file]
        entries = [] if blocks is None else blocks.all()
        front = front_lib.front(self._lm, entries, self._window, self._state.window, lasting_fit.SINKS)
        growth = [] if blocks is None else self._growth[method.law, method.file]
        held, by_law = growth[-1][1] if growth else 0, None
        if blocks is not None:
            by_law = lawful(method, held, blocks.written)
        lm = self._mixing() if method.mixes else self._lm
        alone = front_lib.front(self._lm, [], self._window, self._state.window, lasting_fit.SINKS)
        fronts, chooses = in_front(lm, front, alone, self._choice)
        points = growth[:: -(-len(growth) // _POINTS) or 1] + growth[-1:]
        yield Kept(lm, fronts, chooses, held, by_law, front.k.shape[2], points, None, self._rate)

    def _mixing(self) -> LM:
        """The model, which mixes in what the states of the stream say: of each text all but the last."""
        followed = np.delete(np.arange(len(self._stream.ids)), self._stream.ends - 1)
        following = self._stream.ids[followed + 1]
        store = neighbours.Datastore.of(half(self._x[followed], "state"), following, self._how, len(following))
        return dataclasses.replace(self._lm, params=neighbours.beside(self._lm.params, store))


def in_front(lm: LM, front: front_lib.Front, alone: front_lib.Front, choice: Choice) -> tuple[gate.Fronts, bool]:
    """What may stand in front of a question: the model's memory, one row, with all of this, with `alone`, and with
    nothing; and False. Or a choice among it, none, and nothing; and True."""
    if chooses := front.k.shape[2] > choice.whole:
        memory = front_lib.chosen(lm, front, choice)
        near = front_lib.choosing_nothing(memory)
    else:
        memory, near = front_lib.dense(lm, front), front_lib.dense(lm, alone)
    return gate.Fronts(memory, near, front_lib.nothing(lm, memory)), chooses


def lawful(method: Method, held: int, written: int) -> int:
    """How many entries per head the law of a method allows after so many tokens. AtomError where others are held."""
    if held != (by_law := method.law.held(written)):
        raise AtomError(f"lasting: {method.name} holds {held} entries per head, and its law says {by_law}")
    return by_law


def _empty(method: Method, model: Model) -> Blocks:
    """Of what a memory with this law and score will hold. AtomError for a score of another model."""
    if method.learned is not None and method.learned.model != model.fingerprint:
        raise AtomError(f"lasting.scores: {method.score} was fitted for another model, {method.learned.model}")
    name = method.file if method.learned is None else scores.LEARNED
    return Blocks(None, Manifest(FORMAT, model, Settings(method.law, name)), None)
