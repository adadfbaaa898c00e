"""A memory of what a model has read, in a directory: it outlasts the process, and grows by a law."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting import score as scores
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.kvcache.lasting.score import LEARNED, SCORES, Linear, Seen
from atom_jax.lasting import front as front_lib
from atom_jax.lasting import gate, learned, loading, making, reread
from atom_jax.lasting import inside as inside_lib
from atom_jax.lasting import states as states_lib
from atom_jax.lasting import texts as texts_lib
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.codec import CODECS
from atom_jax.lasting.contents import Contents
from atom_jax.lasting.pages import Pages
from atom_jax.lasting.reader import Reader, State, model_of
from atom_jax.lasting.store import KNN, LEVELS, Settings, Source, Store, Window
from atom_jax.lasting.texts import Page, Reading
from atom_jax.models import registry
from atom_jax.nn import neighbours as neighbours_lib
from atom_jax.nn.neighbours import Datastore, Neighbours
from atom_jax.session.prompts import listed, token_rows
from atom_jax.typing import LM, AtomError

# Tokens of a long source between two commits, to the next end of a part, at least.
COMMIT = 65536


class Memory(Contents):
    """A memory on disk: `open` it, `read` texts into it, generate with it. Any number may look while one reads.

    What it is, is what MEMORY.json says; others see what was committed when they look anew (`refresh`).
    """

    def __init__(self, store: Store, lm: LM | None, choice: Choice, neighbours: Neighbours):
        """See `open`."""
        super().__init__(store, choice)
        self._lm, self._front, self.neighbours = lm, None, neighbours
        # `fronts` but the first.
        self._others: tuple[memory_lib.Memory, memory_lib.Memory] | None = None
        self._pages: Pages | None = None
        self._datastore: Datastore | None = None

    @classmethod
    def open(
        cls, directory: str | os.PathLike, lm: LM | None = None, *, law: str | None = None,
        score: str | os.PathLike | None = None, part: int | None = None, sinks: int | None = None,
        codec: str | None = None, text: str | None = None, parts: Sequence[str] | None = None,
        choice: Choice | None = None, neighbours: Neighbours | None = None,
    ) -> Memory:  # fmt: skip
        """The memory in a directory, which is made where there is none.

        Args:
          lm: the model that it belongs to; its cache policy plays no part. None: only to look, and to forget.
          law: such as "sqrt" (the default), "log:entries=32" or "all" (`levels.Law.parse`).
          score: how tokens are compared, by a name of `score.SCORES`, or a file with a learned one (`learned.save`).
            By default the one that ships for the model (`learned.shipped`), else "observed".
          part: tokens that are read at once (512). sinks: first ones of a source that stay in view (4). Of a model
            with units of its own both count these. codec: a name of `codec.CODECS` ("float16"). text: "ids": token
            ids are kept too, for `recall`; "none": they are not.
          parts: what it is made of: "levels" of entries, which stand before prompts (by default), "knn", final states
            with the tokens that followed, which are mixed into what the model says (kNN-LM), or both.
          choice: how prompts choose among more entries than they all attend to. neighbours: how states are mixed in.
        But for the last two, all of these are fixed when it is made. Raises AtomError for a memory of another model
        or with other settings, for what is damaged, and where something else is in the directory.
        """
        store = Store(directory)
        name = score if score in (None, LEARNED, *SCORES) else LEARNED
        wanted = {"score": name, "part": part, "sinks": sinks, "codec": codec, "text": text}
        wanted = {field: value for field, value in wanted.items() if value is not None}
        wanted |= {} if law is None else {"law": Law.parse(law)}
        wanted |= {} if parts is None else {"parts": tuple(listed("parts", parts))}
        lm = None if lm is None else registry.with_memory(lm, None)
        if not store.exists:
            if lm is None:
                raise AtomError(f"{directory}: there is no memory")
            making.make(store, lm, dataclasses.replace(Settings(), **wanted), score)
        memory = cls(store, lm, choice or Choice(), neighbours or Neighbours())
        making.compare(store, memory._manifest, lm, wanted, score, memory._learned)
        return memory

    def refresh(self) -> None:
        """Looks at what others have committed since."""
        before = self._manifest
        super().refresh()
        if self._manifest != before:
            self._front, self._others, self._datastore = None, None, None

    def read(self, text: Any, name: str | None = None, *, say: Callable[[int], None] | None = None) -> Reading:
        """Reads a text to its end, and keeps of it what the law allows.

        Args:
          text: a path, or a string that is one of a file; another string, or bytes; or token ids.
          name: of the source; None: the file's, or one made from what the text is.
          say: called with the number of tokens after every part.
        Committed at its end, and about every 65,536 tokens of it: the same call goes on behind the last commit. What
        was read to its end is not read again. Raises AtomError for another text under a known name, while another
        source is unfinished, and while another process writes.
        """
        began, before = time.perf_counter(), self.length
        lm = self._model("reading")
        what = texts_lib.content(text)
        ids = token_rows(lm, [what.data], first=True)[0]
        sha = hashlib.sha256(ids.tobytes() if what.raw is None else what.raw).hexdigest()
        size = 0 if what.raw is None else len(what.raw)
        source = Source(-1, name or what.label or f"text-{sha[:8]}", sha, 0, size, False)
        with self._writing():
            nats, tokens = self._read(source, ids, say or (lambda n: None))
        seconds = time.perf_counter() - began
        after, mean = self.stats(), nats / max(tokens, 1)
        return Reading(source.name, tokens, mean, before, after["entries"], after["bytes"], seconds)

    def _read(self, source: Source, ids: np.ndarray, say: Callable[[int], None]) -> tuple[float, int]:
        """Nats of the tokens that were read, and how many these are."""
        where, known = self._store.directory, {s.name: s for s in self.sources}
        old = known.get(source.name, source)
        if old.sha256 != source.sha256:
            raise AtomError(f"{where}: another text is known there as {source.name}; give this one a name of its own")
        if old.finished:
            return 0.0, 0
        if others := [s.name for s in known.values() if not s.finished and s is not old]:
            raise AtomError(f"{where}: {others[0]} was not read to its end; read or forget that first")
        reader, learned = Reader(self._lm, self.settings.part, self.settings.sinks), self._learned()
        blocks, state = self._resumed(reader)

        def keep(seen: Seen | None) -> None:
            if seen is not None and LEVELS in self.settings.parts:
                blocks.add(Entries.scored(seen, scores.score(self.settings.score, seen, learned)))

        if old is source:
            source = dataclasses.replace(source, id=1 + max((s.id for s in self.sources), default=-1))
            if state is not None:
                keep(reader.end(state))
            state = reader.begin(source.id)
        else:
            source = old
        part, nats, saved, began, said, ends = self.settings.part, 0.0, source.tokens, source.tokens, [], []
        every = max(COMMIT // part, 1) * part
        while (at := state.tokens) < len(ids):
            before = state.window
            state, seen = reader.read(state, ids)
            keep(seen)
            nats, end = nats + state.nats, state.tokens
            said += [state.x_td[: end - at]] if KNN in self.settings.parts else []
            ends += [state.ends[1 : state.window.count + 1]] if state.window is not before else []
            if end == len(ids) or end - saved >= every:
                units = state.window.first + state.window.count if reader.inside.units else 0
                source = dataclasses.replace(source, tokens=end, finished=end == len(ids), units=units)
                known = ends if reader.inside.units else None
                new = texts_lib.arrays(self.settings.text, ids[saved:end], known, self._lm.config.vocab_size)
                new |= states_lib.arrays(said, ids[saved + 1 : end + 1])
                source = self._commit(reader, blocks, state, source, new)
                saved, said, ends = end, [], []
            say(end - at)
        return nats, len(ids) - began

    def _commit(
        self, reader: Reader, blocks: Blocks, state: State, source: Source, new: dict[str, dict[str, np.ndarray]]
    ) -> Source:  # fmt: skip
        """Writes what was read of a source; the source as it is known then. new: what files of their own hold of it,
        by the fields of `Source` that name them."""
        number, files = self._manifest.next, {}
        for field, arrays in new.items():
            name = f"{field}-{number:08d}.safetensors"
            source = dataclasses.replace(source, **{field: (*getattr(source, field), name)})
            files[name], number = arrays, number + 1
        sources = (*(s for s in self.sources if s.id != source.id), source)
        self._write(blocks, sources, state.window, reader.arrays(state), number, files)
        return source

    def _write(
        self, blocks: Blocks, sources: tuple[Source, ...], window: Window, kept: dict[str, np.ndarray], number: int,
        files: dict[str, dict[str, np.ndarray]],
    ) -> None:  # fmt: skip
        """Commits all that has changed. number: of the next new file."""
        segments, new, number = blocks.files(number)
        waiting = len(blocks.waiting)
        tail = {f"{loading.WINDOW}{name}": x for name, x in kept.items()}
        tail |= blocks.waiting.arrays(CODECS["float16"]) if waiting else {}
        name = f"tail-{number:08d}.safetensors" if tail else None
        manifest = dataclasses.replace(
            self._manifest, next=number + 1, written=blocks.written, waiting=waiting, segments=segments,
            sources=sources, window=window, tail=name, codes=blocks.codes,
        )  # fmt: skip
        self._store.commit(manifest, {**files, **new, **({name: tail} if tail else {})})
        self.refresh()

    def forget(self, name: str) -> int:
        """Takes a source out: its entries, its window, its ids and states. Returns how many tokens it had.

        Nothing of it is in other sources: none is read with another in view. What lost its place to it does not come
        back.
        """
        with self._writing():
            source = self._known(name)
            waiting, kept = self._tail()
            window = self._manifest.window
            if window.source == source.id:
                window, kept = Window(), {}
            blocks = Blocks(self._store, self._manifest, waiting)
            blocks.forget(source.id)
            others = tuple(s for s in self.sources if s.id != source.id)
            self._write(blocks, others, window, kept, self._manifest.next, {})
        return source.tokens

    @property
    def taken(self) -> int:
        """Of the model's positions of tokens, those that a prompt can't have because of what is in front of it. Where
        places are those of units, a prompt is taken to have as many of them as tokens."""
        config = self._model("answering").config
        inside, window = inside_lib.of(config), self._manifest.window
        read = sum(s.tokens for s in self.sources if s.id == window.source)
        return max(self.ahead + config.max_length - inside.limit, min(read, inside.near), min(self.length, 1))

    def front(self, rows: int = 1) -> memory_lib.Memory:
        """What the model keeps of rows that have read nothing yet, and lean on this memory: all that it holds, at
        places from 0 on, or a choice among it. AtomError where that exceeds the model's positions."""
        return memory_lib.rows(self._whole(), np.zeros(rows, np.int32))

    def fronts(self) -> gate.Fronts:
        """What may stand in front of a prompt, as `gate.front` takes it."""
        memory = self._whole()
        if self._others is None:
            lm = self._model("answering")
            if self.chooses:
                near = front_lib.choosing_nothing(memory)
            else:
                near = front_lib.dense(lm, self._current(lambda: loading.near(self._store, self._manifest, lm)))
            self._others = near, front_lib.nothing(lm, memory)
        return gate.Fronts(memory, *self._others)

    def _whole(self) -> memory_lib.Memory:
        """As `front` of one row, which is kept."""
        lm = self._model("answering")
        if self.ahead >= (limit := inside_lib.of(lm.config).limit):
            raise AtomError(
                f"{self._store.directory}: the {self.ahead} entries that a prompt attends to leave no room in the"
                f" {limit} positions of the model"
            )
        if self._front is None:
            self._front, self._others = self._current(self._made), None
        return self._front

    def weigh(
        self, prompts: Sequence[np.ndarray], alone: Sequence[np.ndarray], passages: Sequence[np.ndarray]
    ) -> np.ndarray:  # fmt: skip
        """Nats of prompts on every side, f64 [5, n] (`gate.weigh`)."""
        lm = self._model("answering")
        if (params := self.mixing(lm.params)) is not lm.params:
            lm = dataclasses.replace(lm, params=params)
        return gate.weigh(lm, self.fronts(), prompts, alone, passages)

    def mixing(self, params: Any) -> Any:
        """The model's parameters, as it has them or laid out, and beside them the states of this memory, where it has
        any: logits are those of the mixture then."""
        if KNN not in self.settings.parts or not self.neighbours.weight:
            return params
        if self._datastore is None:
            self._datastore = states_lib.datastore(
                self._current(self._states), self._model("answering"), self.neighbours
            )
        return params if self._datastore is None else neighbours_lib.beside(params, self._datastore)

    def recall(self, prompts: Any, k: int = 5) -> list[list[Page]]:
        """For every prompt (as of `generate`) the k pages of 32 tokens (or units) whose entries its tokens (or units)
        attend to most; without levels, those with the nearest states, by their shares in what is mixed in after its
        tokens."""
        lm, levels = self._model("recall"), LEVELS in self.settings.parts
        rows = token_rows(lm, prompts, first=not levels)
        if not (self.length if levels else self.states):
            return [[] for _ in rows]
        if (longest := max(map(len, rows)) + self.length) > (limit := inside_lib.of(lm.config).limit):
            raise AtomError(f"prompts: with the memory one takes {longest} of {limit} positions")
        if levels:
            found = front_lib.looked_at(lm, self._current(self._all), rows, k)
        else:
            found = states_lib.looked_at(lm, self._current(self._states), self.neighbours, rows, k)
        return [[self._page(*page) for page in pages] for pages in found]

    def passages(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Ids of the n passages of what was read that share most words with a prompt, i32 [t], the best one last.
        AtomError where ids are not kept."""
        if self.settings.text != "ids":
            raise AtomError(f"{self._store.directory}: keeps no token ids (text={self.settings.text}) to read again")
        texts = self._current(lambda: [self._text(s)[0] for s in self.sources])
        return reread.again(texts, ids, n)

    def belongs(self, lm: LM) -> bool:
        """Whether it is a memory of this model."""
        mine, others = (jax.tree.leaves(x.params) for x in (self._model("answering"), lm))
        same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others))
        return same or model_of(registry.with_memory(lm, None)) == self.model

    def close(self) -> None:
        """Lets go of what is held in memory, and of files that no session leans on."""
        self._front, self._others, self._pages, self._datastore = None, None, None, None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _page(self, source: int, first: int, last: int, weight: float) -> Page:
        found = next((s for s in self.sources if s.id == source), None)
        if found is None:
            raise AtomError(f"{self._store.directory}: holds entries of a source {source} that it does not know")
        return texts_lib.page(found, *self._text(found), first, last, weight, self._lm.tokenizer)

    def _text(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """As of `loading.text`; AtomError for ids that the model doesn't have."""
        ids, ends = loading.text(self._store, source)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._model("reading").config.vocab_size:
            raise AtomError(f"{self._store.directory}: holds token ids of {source.name} that the model does not have")
        return ids, ends

    def _model(self, what: str) -> LM:
        if self._lm is None:
            raise AtomError(f"{self._store.directory}: was opened without a model, which {what} needs")
        return self._lm

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Keeps others from writing, begins at what is there, and removes what they left unfinished."""
        with self._store.lock():
            self.refresh()
            self._store.clean(self._manifest)
            yield

    def _all(self) -> front_lib.Front:
        return loading.front(self._store, self._manifest, self._lm)

    def _made(self) -> memory_lib.Memory:
        """What `front` gives to one row."""
        if not self.chooses:
            return front_lib.dense(self._lm, self._all())
        if not self.paged:
            return front_lib.chosen(self._lm, self._all(), self.choice)
        made, self._pages = loading.paged(self._store, self._manifest, self._lm, self.choice, self._pages)
        return made

    def _resumed(self, reader: Reader) -> tuple[Blocks, State | None]:
        waiting, kept = self._tail()
        blocks = Blocks(self._store, self._manifest, waiting)
        if self._manifest.window.source < 0:
            return blocks, None
        where = str(self._store.directory / self._manifest.tail)
        window = self._manifest.window
        tokens = sum(s.tokens for s in self.sources if s.id == window.source)
        return blocks, reader.state(kept, window, tokens, where)

    def _learned(self) -> Linear | None:
        name = self._manifest.score
        return None if name is None else learned.of(self._store.read(name), str(self._store.directory / name))
