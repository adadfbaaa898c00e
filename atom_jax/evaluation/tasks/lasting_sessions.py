"""Streams that are read as a user reads them: every text by a process of its own, into a memory on disk for every law
and score."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from atom_jax import config
from atom_jax.evaluation import cache
from atom_jax.evaluation.tasks import lasting_fit, lasting_streams, planted
from atom_jax.evaluation.tasks.lasting_streams import Kept, Method
from atom_jax.files import replaced
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.kvcache.lasting.score import SCORES
from atom_jax.lasting import front as front_lib
from atom_jax.lasting import learned
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.store import KNN, LEVELS, Model
from atom_jax.nn.neighbours import Neighbours
from atom_jax.typing import LM, AtomError


class _Home(NamedTuple):
    """A memory on disk: what it is made with, and its directory."""

    options: dict[str, Any]
    directory: pathlib.Path


class Directories:
    """A stream that was read into memories on disk, session by session. What was read is not read again."""

    def __init__(
        self, lm: LM, model: Model, stream: planted.Stream, chosen: Sequence[Method], part: int, name: str,
        choice: Choice, how: Neighbours, checkpoint: str, where: pathlib.Path, lines: cache.Lines,
    ):  # fmt: skip
        """Reads. checkpoint: what the processes load, `lm`. where: the directory of all memories. lines: where the
        memories' growth is kept.

        Raises AtomError where a process fails, and for a memory that holds something else than was to be read."""
        self._lm, self._stream, self._choice, self._how = lm, stream, choice, how
        self._names = [f"{i}-{pathlib.Path(text).name}" for i, text in enumerate(lasting_streams.names(name))]
        self._homes = {m: _home(m, model, stream, part, where) for m in map(_made_by, chosen) if m is not None}
        if not self._homes:
            alone = Method("", law=Law(0.0), file="observed")
            self._homes = {alone: _home(alone, model, stream, part, where)}
        known = {row["key"]: row["rows"] for row in lines.rows if cache.numbers(row["rows"], (1, 2))}
        self._growth: dict[pathlib.Path, list[tuple[int, int]]] = {}
        for home in self._homes.values():
            # Made here, so that a process that loads another model is refused.
            with Memory.open(home.directory, lm, **home.options):
                pass
            self._growth[home.directory] = points = [(0, 0)]
            for session, ids in zip(self._names, stream.texts):
                key = f"{home.directory.name} {session}"
                stats = _read(home.directory, session, ids, checkpoint)
                if stats is not None:
                    known[key] = [[stats["written"], stats["held"]]]
                    lines.append([{"key": key, "rows": known[key]}])
                points += map(tuple, known.get(key, []))

    @contextlib.contextmanager
    def kept(self, method: Method) -> Iterator[Kept]:
        """What a method, one of those that were named, finds on disk. Where it keeps nothing itself, the window is
        that of another memory."""
        own = _made_by(method)
        directory = (self._homes[own] if own else next(iter(self._homes.values()))).directory
        with Memory.open(directory, self._lm, choice=self._choice, neighbours=self._how) as memory:
            self._check(memory)
            stats = memory.stats()
            if method.law is None:
                front = front_lib.front(self._lm, [], *memory.latest(), lasting_fit.SINKS)
                fronts, chooses = lasting_streams.in_front(self._lm, front, front, self._choice)
                held, by_law, places = 0, None, front.k.shape[2]
            else:
                fronts, chooses = memory.fronts(), memory.chooses
                held, places = memory.held, memory.length
                by_law = lasting_streams.lawful(method, held, stats["written"])
            lm = dataclasses.replace(self._lm, params=memory.mixing(self._lm.params)) if method.mixes else self._lm
            # How it stands now is known, too, where an interruption came between a session and its point.
            points = sorted({*self._growth[directory], (stats["written"], held)}) if own and held else []
            yield Kept(lm, fronts, chooses, held, by_law, places, points, stats["bytes"] if own else None, None)

    def _check(self, memory: Memory) -> None:
        """AtomError unless a memory has read the texts of the stream, and these alone."""
        there = {source.name: source.finished and memory.ids(source.name) for source in memory.sources}
        wanted = dict(zip(self._names, self._stream.texts))
        if there.keys() != wanted.keys() or any(not np.array_equal(there[x], wanted[x]) for x in wanted):
            raise AtomError(f"lasting: a memory has read {', '.join(there)}, and not the stream as it is; delete it")


def _made_by(method: Method) -> Method | None:
    """The method with the same memory on disk that has no more than that; None for one that keeps nothing."""
    if method.law is None and not method.mixes:
        return None
    return method._replace(name="", score="", learned=None, rereads=False)


def _home(own: Method, model: Model, stream: planted.Stream, part: int, where: pathlib.Path) -> _Home:
    parts = (*((LEVELS,) if own.law is not None else ()), *((KNN,) if own.mixes else ()))
    score = own.file if own.file in ("", *SCORES) else learned.load(own.file).weight.tobytes().hex()
    law = "" if own.law is None else str(own.law)
    what = [config.to_json(model), law, score, parts, part, stream.ends.tolist()]
    digest = hashlib.sha256(json.dumps(what).encode() + stream.ids.tobytes()).hexdigest()[:12]
    said = re.sub(r"\W+", "-", "-".join([law, pathlib.Path(own.file).stem, *parts[own.law is not None :]])).strip("-")
    options = {"score": own.file or "observed", "part": part, "sinks": lasting_fit.SINKS, "parts": parts}
    return _Home(options | ({"law": law} if law else {}), where / f"{said}-{digest}")


def _read(directory: pathlib.Path, session: str, ids: np.ndarray, checkpoint: str) -> dict[str, Any] | None:
    """Has a process read a session; what the memory says of itself afterwards, None where it was read before."""
    if any(source.name == session and source.finished for source in Memory.open(directory).sources):
        return None
    file = directory.with_name(f"{directory.name}.npy")
    try:
        with replaced(file) as part, open(part, "wb") as to:
            np.save(to, ids)
        command = [sys.executable, "-m", "atom_jax", "remember", f"--checkpoint={checkpoint}",
                   f"--memory_dir={directory}", "--ids", f"--source={session}", str(file)]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    except OSError as e:
        raise AtomError(f"{e.filename or file}: {e.strerror or e}") from None
    finally:
        file.unlink(missing_ok=True)
    if done.returncode:
        raise AtomError(f"lasting.processes: the process that read {session} ended with {done.returncode}")
    print(done.stdout.decode(errors="replace"), end="", file=sys.stderr, flush=True)
    return Memory.open(directory).stats()
