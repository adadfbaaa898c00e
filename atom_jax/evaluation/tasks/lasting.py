"""Lasting memories next to each other: what a model still knows of a long text that it has read once, in parts.

A stream is the beginning of a novel, or of several, with facts planted in it. It is read once, and what each law and
score keep of it is found from that; or processes read it into memories on disk. Questions are answered from sinks,
entries and the window alone. Another book is read behind the same, which no memory should make harder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax.evaluation import cache
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Result
from atom_jax.evaluation.tasks import lasting_ask, lasting_fit, lasting_plot, lasting_table, planted
from atom_jax.evaluation.tasks.lasting_ask import Asked, Said
from atom_jax.evaluation.tasks.lasting_sessions import Directories
from atom_jax.evaluation.tasks.lasting_streams import Held, Kept, Method, methods, names, stream_of
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import reread, states
from atom_jax.lasting.reader import model_of
from atom_jax.lasting.store import Model
from atom_jax.models import registry
from atom_jax.nn.neighbours import Neighbours
from atom_jax.typing import LM, AtomError


@dataclasses.dataclass(frozen=True)
class LastingSettings:
    """What is compared, and on what.

    streams: novels (`data.builtin.novels`) or files, or several with + between them, of each of which as much is read
        one after another, every one a source. tokens: of each stream, facts included. facts: planted in each, of
        these kinds (`planted.KINDS`; (): of all). quotes: passages of a stream's own that are asked for by what
        precedes them, a kind beside the facts.
    laws: as of `Law.parse`; "none" keeps only the window, "reread" puts `passages` of the text in front of the
        question, and "knn" mixes in `neighbours` among the states of what was read; together with a + between them,
        as in "sqrt+reread". scores: names, "learned" (the one that ships for the model) or files
        that fit_memory wrote; laws that choose run with each of them.
    part: tokens that are read at once. choice: of pages, where more is held than `choice.whole`. batch: questions
        that are answered at once. seed: of facts.
    later: another book than those of the streams: so many `windows` (0: none) of it, of `scored` tokens each, are
        scored behind what every method has kept.
    processes: every text of a stream is read by a process of its own, which loads `checkpoint` (of the command: its
        own), into a memory on disk for every law and score.
    """

    streams: tuple[str, ...] = ("pride_and_prejudice", "mansfield_park", "northanger_abbey")
    tokens: int = 8192
    facts: int = 24
    kinds: tuple[str, ...] = ()
    quotes: int = 0
    laws: tuple[str, ...] = ("none", "log", "sqrt", "all", "reread")
    scores: tuple[str, ...] = ("observed", "observed_head", "random")
    passages: int = 2
    part: int = 512
    choice: Choice = dataclasses.field(default_factory=Choice)
    neighbours: Neighbours = dataclasses.field(default_factory=Neighbours)
    batch: int = 4
    seed: int = 0
    later: str = "persuasion"
    windows: int = 16
    scored: int = 256
    processes: bool = False
    checkpoint: str = ""

    def __post_init__(self):
        some = (1, 2**24)
        config.check(
            self, tokens=(2, 2**30), facts=some, quotes=(0, 2**24), passages=some, part=some, batch=some,
            seed=(0, 2**31 - 1), windows=(0, 2**20), scored=some,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lasting:
    """How many answers are right, by law and score."""

    settings = LastingSettings()

    def run(self, lm: LM, settings: LastingSettings, encoder: Encoder, out: pathlib.Path | None) -> Result:
        """Rows of the results in the notes, under "rows": one for each stream, method and kind of facts ("" for all);
        under "groups", "ages" and "later" what `lasting_table` makes of them. With `out` finished rows are kept in
        OUT.lasting.jsonl, memories on disk in OUT.memories, and neither is measured or read again; a picture is drawn
        next to it."""
        lm = registry.with_memory(lm, None)
        model = model_of(lm)
        chosen = methods(settings.laws, settings.scores, model.fingerprint)
        _check(lm, settings, chosen, out)
        windows = _windows(settings, encoder)
        path = out and out.with_name(out.name + ".lasting.jsonl")
        rows = []
        with contextlib.closing(cache.Lines(path, {"key": str, "rows": list})) as lines:
            known = {row["key"]: row["rows"] for row in lines.rows if _are_rows(row["rows"])}
            for number, name in enumerate(settings.streams):
                # Facts of a fit, which draws with (seed, number), are others.
                draw = np.random.default_rng((settings.seed, 7, number))
                stream = stream_of(name, settings.kinds, settings.facts, settings.tokens, draw, encoder)
                keys = [_key(model, settings, stream, windows, method) for method in chosen]
                todo = [method for key, method in zip(keys, chosen) if key not in known]
                held = read(lm, model, stream, todo, settings, name, out, lines) if todo else None
                alone: dict[Any, list[Said]] = {}
                for key, method in zip(keys, chosen):
                    if key not in known:
                        with held.kept(method) as kept:
                            known[key] = measure(kept, stream, method, settings, encoder, windows, name, alone)
                        lines.append([{"key": key, "rows": known[key]}])
                    rows += known[key]
        if out is not None:
            lasting_plot.draw(rows, out.with_suffix(".png"))
        notes = {part: getattr(lasting_table, part)(rows) for part in ("groups", "ages", "later")}
        return Result({}, len(rows), {"rows": rows, **notes}, lasting_table.table(rows))


def read(
    lm: LM, model: Model, stream: planted.Stream, todo: list[Method], settings: LastingSettings, name: str,
    out: pathlib.Path | None, lines: cache.Lines,
) -> Held | Directories:  # fmt: skip
    """A stream, read for these methods."""
    how = (lm, model, stream, todo, settings.part, name, settings.choice, settings.neighbours)
    if not settings.processes:
        return Held(*how)
    return Directories(*how, settings.checkpoint, out.with_name(out.name + ".memories"), lines)


def measure(
    kept: Kept, stream: planted.Stream, method: Method, settings: LastingSettings, encoder: Encoder,
    windows: list[Asked], name: str, alone: dict[Any, list[Said]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one method on one stream. alone: what is said without any, kept from one method to the next."""
    first = np.array(getattr(kept.lm.tokenizer, "front", ()), np.int32)

    def ask(what: str, asked: list[Asked]) -> list[Said]:
        def said(front: Memory, passages: list[np.ndarray]) -> list[Said]:
            return lasting_ask.ask(kept.lm, front, kept.chooses, asked, passages, settings.batch)

        none, fronts = [first[:0]] * len(asked), kept.fronts
        passages = [reread.again(stream.texts, q, settings.passages) for q, _ in asked] if method.rereads else none
        lasting_ask.check(kept.lm, fronts.memory, kept.chooses, asked, passages)
        sides = [said(fronts.memory, passages)]
        if not settings.choice.gated or (method.law is None and not method.rereads):
            return sides[0]
        if method.rereads and method.law is not None:
            sides = [said(fronts.memory, none), said(fronts.near, passages), *sides]
        for side, front, ahead in (("near", fronts.near, none), ("nothing", fronts.nothing, [first] * len(asked))):
            if (key := (what, side, method.mixes)) not in alone:
                alone[key] = said(front, ahead)
            sides.append(alone[key])
        return [lasting_ask.mixed(each) for each in zip(*sides)]

    facts = list(zip(stream.facts, stream.at.tolist()))
    facts += [(again, at) for fact, at in facts if (again := planted.in_other_words(fact)) is not None]
    asked = [(fact.kind, *planted.asked(fact, encoder), at) for fact, at in facts]
    asked += [("quotes", *quote) for quote in planted.quotes(stream, settings.quotes)]
    found = ask("facts", [(q, a) for _, q, a, _ in asked])
    later = [float(said.nats.mean()) for said in ask("later", windows)] if windows else []
    rows = []
    for kind in ("", *dict.fromkeys(kind for kind, *_ in asked)):
        mine = [i for i, (of, *_) in enumerate(asked) if kind == of or (not kind and i < len(stream.facts))]
        hits, nats = ([getattr(found[i], part) for i in mine] for part in ("hits", "nats"))
        rows.append({
            "stream": name, "law": method.name, "score": method.score, "kind": kind, "facts": len(mine),
            "entries": kept.entries, "by_law": kept.by_law, "front": kept.front, "bytes": kept.bytes,
            "right": float(np.concatenate(hits).mean()), "whole": float(np.mean([h.all() for h in hits])),
            "nats": float(np.concatenate(nats).mean()), "ages": [len(stream.ids) - asked[i][3] for i in mine],
            "rights": [float(h.mean()) for h in hits], "tokens_per_second": kept.rate,
        })  # fmt: skip
    rows[0] |= {
        "later": later,
        "growth": [list(point) for point in kept.growth],
        "kept_by": "" if method.law is None else str(method.law),
    }
    return rows


def _check(lm: LM, settings: LastingSettings, chosen: list[Method], out: pathlib.Path | None) -> None:
    if not settings.streams:
        raise AtomError("lasting.streams: there is none")
    if any(method.mixes for method in chosen):
        states.check(lm, "lasting.laws")
    if settings.windows and settings.later in (text for stream in settings.streams for text in names(stream)):
        raise AtomError(f"lasting.later: {settings.later} is among the streams; name another book")
    if settings.processes and (out is None or not settings.checkpoint):
        raise AtomError(
            "lasting.processes: memories lie beside --out, and processes load lasting.checkpoint: set both"
        )


def _windows(settings: LastingSettings, encoder: Encoder) -> list[Asked]:
    if not settings.windows:
        return []
    ids, _ = encoder.tokenizer.spans(lasting_fit.text_of(settings.later))
    return lasting_ask.another_book(ids, settings.windows, settings.scored)


def _are_rows(value: Any) -> bool:
    """Whether something that was read has the form of what `measure` returns."""
    if not value or not all(isinstance(row, dict) and _is_row(row) for row in value):
        return False
    growth, later = (value[0].get(name) for name in ("growth", "later"))
    points = isinstance(growth, list) and (not growth or cache.numbers(growth, (len(growth), 2)))
    return points and isinstance(later, list) and cache.numbers(later) and isinstance(value[0].get("kept_by"), str)


def _is_row(row: dict[str, Any]) -> bool:
    words, single = ("stream", "law", "score", "kind"), ("facts", "entries", "front", "right", "whole", "nats")
    return (
        all(isinstance(row.get(name), str) for name in words)
        and all(cache.numbers(row.get(name), ()) for name in single)
        and all(row.get(name) is None or cache.numbers(row[name], ()) for name in ("by_law", "bytes"))
        and all(cache.numbers(row.get(name), (row["facts"],)) for name in ("rights", "ages"))
    )


def _key(
    model: Model, settings: LastingSettings, stream: planted.Stream, windows: list[Asked], method: Method
) -> str:  # fmt: skip
    fit = None if method.learned is None else method.learned.weight.tobytes().hex()
    what = [
        config.to_json(model), method.name, method.score, fit, settings.part, settings.passages, stream.facts,
        stream.ends.tolist(), config.to_json(settings.choice), settings.processes, settings.quotes,
        config.to_json(settings.neighbours) if method.mixes else None,
    ]  # fmt: skip
    arrays = [stream.ids, *(ids for both in windows for ids in both)]
    return hashlib.sha256(json.dumps(what).encode() + b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]
