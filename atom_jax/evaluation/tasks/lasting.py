"""Lasting memories next to each other: what a model still knows of a long text that it has read once, in parts.

A stream is the beginning of a novel with facts planted in it. It is read once; what each law and score keep of it is
found from that, as `remember` would, and questions are answered from sinks, entries and the window alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.evaluation import cache
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Metric, Result, columns, proportion
from atom_jax.evaluation.tasks import kv, lasting_fit, planted
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting import score as scores
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.kvcache.lasting.score import SCORES, Linear, Seen
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import front as front_lib
from atom_jax.lasting import learned, reread, states
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.codec import half
from atom_jax.lasting.reader import Reader, State, model_of
from atom_jax.lasting.store import FORMAT, KNN, Manifest, Model, Settings
from atom_jax.models import registry
from atom_jax.nn import neighbours, scoring
from atom_jax.nn.neighbours import Neighbours
from atom_jax.session import laid_out, reading
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError, Batch

# Ids of a question and of its answer; of the answer's tokens, which are the likeliest, and their nats.
Asked = tuple[np.ndarray, np.ndarray]
Said = tuple[np.ndarray, np.ndarray]
# The laws that are none (and KNN): of nothing, and of passages that are read again.
NONE, REREAD = "none", "reread"


@dataclasses.dataclass(frozen=True)
class LastingSettings:
    """What is compared, and on what.

    streams: novels (`data.builtin.novels`) or files. tokens: of each, facts included. facts: planted in each, of
        these kinds (`planted.KINDS`; (): of all).
    laws: as of `Law.parse`; "none" keeps only the window, "reread" puts `passages` of the text in front of the
        question, and "knn" mixes in `neighbours` among the states of what was read. scores: names, or files that
        fit_memory wrote; laws that choose run with each of them.
    part: tokens that are read at once. choice: of pages, where more is held than `choice.whole`. batch: questions
        that are answered at once. seed: of facts.
    """

    streams: tuple[str, ...] = ("pride_and_prejudice", "mansfield_park", "northanger_abbey")
    tokens: int = 8192
    facts: int = 24
    kinds: tuple[str, ...] = ()
    laws: tuple[str, ...] = ("none", "log", "sqrt", "all", "reread")
    scores: tuple[str, ...] = ("observed", "observed_head", "random")
    passages: int = 2
    part: int = 512
    choice: Choice = dataclasses.field(default_factory=Choice)
    neighbours: Neighbours = dataclasses.field(default_factory=Neighbours)
    batch: int = 4
    seed: int = 0

    def __post_init__(self):
        some = (1, 2**24)
        config.check(
            self, tokens=(2, 2**30), facts=some, passages=some, part=some, batch=some, seed=(0, 2**31 - 1)
        )  # fmt: skip


class Method(NamedTuple):
    """A law with a score. law: None for NONE, REREAD and KNN. learned: of a score that is none of SCORES."""

    name: str
    score: str
    law: Law | None
    learned: Linear | None


class Held(NamedTuple):
    """A stream that was read: what left the window in turn, where reading stands, and the final states of its tokens,
    [n, d]."""

    stream: planted.Stream
    seen: list[Seen]
    state: State
    rate: float
    states: np.ndarray


@dataclasses.dataclass(frozen=True)
class Lasting:
    """How many answers are right, by law and score."""

    settings = LastingSettings()

    def run(self, lm: LM, settings: LastingSettings, encoder: Encoder, out: pathlib.Path | None) -> Result:
        """Rows of the results in the notes, under "rows": one for each stream, method and kind of facts ("" for all).
        With `out` finished ones are kept in OUT.lasting.jsonl, and not measured again."""
        lm = registry.with_memory(lm, None)
        model, chosen = model_of(lm), methods(settings)
        if any(method.name == KNN for method in chosen):
            states.check(lm, "lasting.laws")
        path = out and out.with_name(out.name + ".lasting.jsonl")
        rows = []
        with contextlib.closing(cache.Lines(path, {"key": str, "rows": list})) as lines:
            known = {row["key"]: row["rows"] for row in lines.rows if _are_rows(row["rows"])}
            for number, name in enumerate(settings.streams):
                stream = stream_of(settings, encoder, number)
                keys = [_key(model, settings, stream, method) for method in chosen]
                held = None if all(key in known for key in keys) else read(lm, stream, settings.part, name)
                for key, method in zip(keys, chosen):
                    if key not in known:
                        known[key] = measure(lm, model, held, method, settings, encoder, name)
                        lines.append([{"key": key, "rows": known[key]}])
                    rows += known[key]
        return Result({}, len(rows), {"rows": rows}, table(rows))


def _are_rows(value: Any) -> bool:
    """Whether something that was read has the form of what `measure` returns."""
    words, single = ("stream", "law", "score", "kind"), ("facts", "entries", "right", "whole", "nats")
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(n), str) for n in words)
        and all(cache.numbers(row.get(n), ()) for n in single) and cache.numbers(row.get("rights"), (row["facts"],))
        for row in value
    )  # fmt: skip


def methods(settings: LastingSettings) -> list[Method]:
    """All that are compared. AtomError for unknown laws and scores."""
    out = []
    for text in kv.joined(settings.laws):
        if text in (NONE, REREAD, KNN):
            out.append(Method(text, "", None, None))
            continue
        law = Law.parse(text)
        for score in settings.scores if law.alpha < 1 else settings.scores[:1]:
            fit = None if score in SCORES else learned.load(score)
            out.append(Method(str(law), pathlib.Path(score).name, law, fit))
    if not out or not settings.scores or not settings.streams:
        raise AtomError("lasting: expected at least one law, score and stream")
    return out


def stream_of(settings: LastingSettings, encoder: Encoder, number: int) -> planted.Stream:
    """A stream of the settings."""
    # Facts of a fit, which draws with (seed, number), are others.
    draw = np.random.default_rng((settings.seed, 7, number))
    text = lasting_fit.text_of(settings.streams[number])
    chosen = planted.facts(settings.kinds, settings.facts, draw)
    return planted.plant(Haystack.of(text, encoder), chosen, settings.tokens, encoder)


def read(lm: LM, stream: planted.Stream, part: int, name: str) -> Held:
    """Reads a stream."""
    began, seen, state, x = time.monotonic(), [], None, []
    for state, left in lasting_fit.read(lm, stream.ids, part, name):
        seen += [] if left is None else [left]
        x.append(np.asarray(state.x_td, np.float32))
    return Held(stream, seen, state, len(stream.ids) / (time.monotonic() - began), np.concatenate(x))


def measure(
    lm: LM, model: Model, held: Held, method: Method, settings: LastingSettings, encoder: Encoder, name: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one method on one stream."""
    stream, window = held.stream, held.state.window
    kept = Reader(lm, settings.part, lasting_fit.SINKS).arrays(held.state)
    entries = [] if method.law is None else _kept(model, held, method)
    front = front_lib.front(lm, entries, kept, window, lasting_fit.SINKS)
    asked = [planted.asked(fact, encoder) for fact in stream.facts]
    if method.name == REREAD:
        asked = [(_with_passages(stream.ids, q, settings.passages), a) for q, a in asked]
    if method.name == KNN:
        lm = _mixing(lm, held, settings.neighbours)
    found = ask(lm, front, asked, settings.batch, settings.choice)
    ages = len(stream.ids) - stream.at
    rows = []
    for kind in ("", *dict.fromkeys(fact.kind for fact in stream.facts)):
        mine = [i for i, fact in enumerate(stream.facts) if kind in ("", fact.kind)]
        hits, nats = ([found[i][j] for i in mine] for j in (0, 1))
        rows.append({
            "stream": name, "law": method.name, "score": method.score, "kind": kind, "facts": len(mine),
            "entries": sum(map(len, entries)), "front": front.k.shape[2],
            "right": float(np.concatenate(hits).mean()), "whole": float(np.mean([h.all() for h in hits])),
            "nats": float(np.concatenate(nats).mean()), "ages": [int(ages[i]) for i in mine],
            "rights": [float(h.mean()) for h in hits], "tokens_per_second": held.rate,
        })  # fmt: skip
    return rows


def _kept(model: Model, held: Held, method: Method) -> list[Entries]:
    """What a memory with this law and score holds of a stream."""
    name = method.score if method.learned is None else scores.LEARNED
    settings = Settings(method.law, name)
    blocks = Blocks(None, Manifest(FORMAT, model, settings), None)
    if method.learned is not None and method.learned.model != model.fingerprint:
        raise AtomError(f"lasting.scores: {method.score} was fitted for another model, {method.learned.model}")
    for seen in held.seen:
        blocks.add(Entries.scored(seen, scores.score(name, seen, method.learned)))
    return blocks.all()


def _mixing(lm: LM, held: Held, how: Neighbours) -> LM:
    """The model, which mixes in what the states of a stream say."""
    following = held.stream.ids[1:]
    store = neighbours.Datastore.of(half(held.states[:-1], "state"), following, how, len(following))
    return dataclasses.replace(lm, params=neighbours.beside(lm.params, store))


def _with_passages(ids: np.ndarray, question: np.ndarray, n: int) -> np.ndarray:
    found = reread.passages([ids], question, n)
    return np.concatenate([*(ids[a:b] for _, a, b in found[::-1]), question])


def ask(lm: LM, front: front_lib.Front, asked: list[Asked], batch: int, choice: Choice) -> list[Said]:
    """For each question and answer, ids: which tokens of the answer are the likeliest, bool [n], and their nats, f32
    [n], each given the true ones before it. choice: of pages, where more is held than `choice.whole`."""
    whole = front.k.shape[2] <= choice.whole
    if not whole and registry.of(lm.config).codec(lm.config).pending:
        raise AtomError(
            "lasting.choice: a model that sees a byte ahead is asked with all entries; make `whole` larger"
        )
    memory = front_lib.dense(lm, front) if whole else front_lib.chosen(lm, front, choice)
    out = []
    for at in range(0, len(asked), batch):
        some = asked[at : at + batch]
        # The last of them again, so that all calls have one shape.
        some += some[-1:] * (batch - len(some))
        cache = memory_lib.rows(memory, np.zeros(batch, np.int32))
        out += (_answers if whole else _chosen_answers)(lm, cache, some, asked)[: len(asked) - at]
    return out


def _answers(lm: LM, cache: Memory, some: list[Asked], asked: list[Asked]) -> list[Said]:
    """Of some of all questions, read with their answers in one call."""
    ids, lengths = padded([np.concatenate(both) for both in some], max(len(q) + len(a) for q, a in asked))
    room = lambda cfg: reading.room(cache, ids.shape[1], cfg)  # noqa: E731
    run = lambda cfg: _ask(laid_out.scanned(lm), ids, lengths, room(cfg), cfg=cfg)  # noqa: E731
    hits, nats = jax.device_get(reading.exactly(run, lm.config))
    parts = [slice(len(q) - 1, len(q) + len(a) - 1) for q, a in some]
    return [(hits[i, part], nats[i, part]) for i, part in enumerate(parts)]


def _chosen_answers(lm: LM, cache: Memory, some: list[Asked], asked: list[Asked]) -> list[Said]:
    """As `_answers`; the question chooses what its answer leans on."""
    ids, lengths = padded([q for q, _ in some], max(len(q) for q, _ in asked))
    params = laid_out.scanned(lm)
    session = Session.begin(lm, ids, lengths, capacity=0, params=params, unroll=False, memory=cache)
    answers, counts = padded([a for _, a in some], max(len(a) for _, a in asked))
    logp = jax.nn.log_softmax(session.verify(answers, counts).logits, axis=-1)
    hit = np.asarray(logp.argmax(-1))[:, :-1] == answers
    nats = -np.asarray(jnp.take_along_axis(logp[:, :-1], jnp.asarray(answers)[..., None], axis=-1))[..., 0]
    return [(hit[i, :n], nats[i, :n]) for i, n in enumerate(counts)]


@functools.partial(jax.jit, static_argnames="cfg")
def _ask(
    params: Any, ids_bt: jax.Array, length_b: jax.Array, memory: Memory, *, cfg: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Of every token but the first, [b, t - 1]: whether it is the likeliest, and its nats; and how many units were
    lost."""
    model, offsets = registry.of(cfg), jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None]
    codec = model.codec(cfg)
    real = (offsets < length_b[:, None]).astype(jnp.int32)
    batch = Batch(ids_bt, memory.length[:, None] + offsets, real)
    x_btd, _, aux = model.hidden(params, batch, cfg=cfg, cache=memory)
    head = lambda x_btd: codec.merge(model.logits(params, x_btd, cfg=cfg))  # noqa: E731
    # Where the form of tokens is decided late, states are those before the tokens.
    before = x_btd[:, 1:] if codec.pending else x_btd[:, :-1]
    said = scoring.score(head, before, codec.plain(ids_bt[:, 1:]), ("hit", "nats"))
    return (said["hit"], said["nats"]), aux.get("lost")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the streams: of every method, and then of every kind of facts."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["law"], row["score"], row["kind"]), []).append(row)
    lines = [("law", "score", "facts", "entries", "right", "whole", "stderr", "nats")]
    order = sorted(groups, key=lambda name: name[2] != "")
    for law, score, kind in order:
        mine = groups[law, score, kind]
        weight = [row["facts"] for row in mine]
        mean = lambda field, mine=mine, weight=weight: float(np.average([r[field] for r in mine], weights=weight))  # noqa: E731
        whole: Metric = proportion([r == 1 for row in mine for r in row["rights"]])
        lines.append((
            law, score, kind or "all", f"{mean('entries'):.0f}", f"{mean('right'):.2f}", f"{whole.value:.2f}",
            f"{whole.stderr:.2f}", f"{mean('nats'):.2f}",
        ))  # fmt: skip
    return columns(lines, 3)


def _key(model: Model, settings: LastingSettings, stream: planted.Stream, method: Method) -> str:
    fit = None if method.learned is None else method.learned.weight.tobytes().hex()
    how = [config.to_json(settings.neighbours)] if method.name == KNN else []
    what = [
        config.to_json(model),
        method.name,
        method.score,
        fit,
        settings.part,
        settings.passages,
        stream.facts,
        config.to_json(settings.choice),
        *how,
    ]
    return hashlib.sha256(json.dumps(what).encode() + stream.ids.tobytes()).hexdigest()[:16]
