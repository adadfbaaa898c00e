"""Entries of a lasting memory and what the law does to them: they wait for a block, which is thinned, then merged.

Everything here is numpy: a memory can be looked at, thinned and forgotten without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from atom_jax.kvcache.lasting import levels
from atom_jax.kvcache.lasting.score import Seen, best
from atom_jax.lasting import codec as codecs
from atom_jax.lasting.codec import CODECS, INDEX, Codec, Learned, index
from atom_jax.lasting.store import Manifest, Model, Segment, Store
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Entries:
    """n entries of every layer and head, the oldest first.

    k, v: float16 [l, h, n, k], keys before RoPE and values. score: f32, place: i32 (of the token in its source) and
    source: i32, [n] where all heads have the same tokens, else [l, h, n].
    """

    k: np.ndarray
    v: np.ndarray
    score: np.ndarray
    place: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return self.k.shape[2]

    @classmethod
    def scored(cls, seen: Seen, score: np.ndarray) -> Entries:
        """Tokens that leave the window, with their scores f32 [n] or [l, h, n]."""
        place = np.broadcast_to(seen.place, score.shape)
        return cls(seen.k, seen.v, score, place, np.full_like(place, seen.source))

    @classmethod
    def none(cls, model: Model) -> Entries:
        """No entries of this model."""
        empty, said = np.zeros((model.layers, model.heads, 0, model.size), np.float16), np.zeros(0, np.int32)
        return cls(empty, empty, np.zeros(0, np.float32), said, said)

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All of them, one after another."""
        parts = [p for p in parts if len(p)] or list(parts)[:1]
        if len(parts) == 1:
            return parts[0]
        return cls(
            *(np.concatenate([getattr(p, f) for p in parts], axis=2) for f in ("k", "v")),
            *(np.concatenate([getattr(p, f) for p in parts], axis=-1) for f in ("score", "place", "source")),
        )

    def cut(self, start: int, end: int | None = None) -> Entries:
        """Those from start to end."""
        part = slice(start, end)
        said = (x[..., part] for x in (self.score, self.place, self.source))
        return Entries(self.k[:, :, part], self.v[:, :, part], *said)

    def take(self, index: np.ndarray) -> Entries:
        """Those at these places, i64 [m], or [l, h, m] for each head."""
        if index.ndim == 1:
            said = (x[..., index] for x in (self.score, self.place, self.source))
            return Entries(self.k[:, :, index], self.v[:, :, index], *said)
        k, v = (np.take_along_axis(x, index[..., None], axis=2) for x in (self.k, self.v))
        each = (np.take_along_axis(np.broadcast_to(x, (*index.shape[:2], x.shape[-1])), index, axis=-1)
                for x in (self.score, self.place, self.source))  # fmt: skip
        return Entries(k, v, *each)

    def thinned(self, keep: int) -> Entries:
        """The `keep` of largest score, of equal ones the newest."""
        return self if len(self) <= keep else self.take(best(self.score, keep))

    def without(self, source: int) -> Entries:
        """Those of other sources. Where heads differ in how many they have, others leave with these, in every head
        those of the smallest score, so that all have as many."""
        stays = self.source != source
        if stays.ndim == 1:
            return self.take(np.flatnonzero(stays))
        keep = int(stays.sum(-1).min())
        return self.take(best(np.where(stays, self.score, -np.inf), keep))

    def arrays(self, codec: Codec) -> dict[str, np.ndarray]:
        """What a file holds of them."""
        said = {"score": self.score, "place": self.place, "source": self.source}
        return {**codec.encode(self.k, self.v), **said}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], codec: Codec, model: Model, where: str) -> Entries:
        """As `arrays` gave them. AtomError, which begins with `where`, for what can't be entries of this model."""
        said = {"score": np.float32, "place": np.int32, "source": np.int32}
        wanted = {*codec.dtypes, *said}
        if missing := sorted(wanted - arrays.keys()):
            raise AtomError(f"{where}: the tensor '{missing[0]}' is missing")
        if unknown := sorted(arrays.keys() - wanted):
            raise AtomError(f"{where}: the tensor '{unknown[0]}' is unknown")
        sizes, there = arrays["k"].shape, {name: (x.shape, x.dtype) for name, x in arrays.items()}
        if len(sizes) != 4 or sizes[:2] != (model.layers, model.heads):
            raise AtomError(f"{where}: holds entries of shape {list(sizes)}, which the manifest does not name")
        right = codec.misfit((*sizes[:3], model.size), there) is None
        right = right and all(there[name][1] == dtype for name, dtype in said.items())
        if not right or {there[name][0] for name in said} not in ({sizes[:3]}, {sizes[2:3]}):
            raise AtomError(f"{where}: its tensors don't fit each other")
        return cls(*codec.decode(arrays), *(arrays[name] for name in said))


@dataclasses.dataclass
class Block:
    """A block: level, blocks of text from `start` to `end`; its entries, where they are known; its segment, where it
    is on disk, or else the arrays that its file is to hold, without those that say of pages what they are."""

    level: int
    start: int
    end: int
    entries: Entries | None
    segment: Segment | None = None
    arrays: dict[str, np.ndarray] | None = None


def codec_of(store: Store, manifest: Manifest) -> tuple[Codec, dict[str, np.ndarray] | None]:
    """How the blocks of a memory are stored, and what its codec has learned. AtomError for a file that doesn't say
    that."""
    m, learned = manifest.model, None if manifest.codes is None else store.read(manifest.codes)
    where = "" if learned is None else str(store.directory / manifest.codes)
    return codecs.of(manifest.settings.codec, learned, (m.layers, m.heads, m.size), where), learned


class Blocks:
    """The entries of one memory, between two commits. A writer adds to them; `files` is what a commit writes."""

    def __init__(self, store: Store, manifest: Manifest, waiting: Entries | None):
        self._store, self._manifest, self._settings = store, manifest, manifest.settings
        self._blocks = [Block(s.level, s.start, s.end, None, s) for s in manifest.segments]
        self._model, self.written = manifest.model, manifest.written
        self.waiting = Entries.none(manifest.model) if waiting is None else waiting
        self._codec, self._learned = codec_of(store, manifest)
        self.codes = manifest.codes

    def add(self, entries: Entries) -> None:
        """Entries that leave the window. Whole blocks are thinned, and merged where the law says so."""
        law = self._settings.law
        self.written += len(entries)
        self.waiting = Entries.joined([self.waiting, entries])
        while len(self.waiting) >= law.block:
            number = self._blocks[-1].end if self._blocks else 0
            block = self.waiting.cut(0, law.block).thinned(law.keep(0))
            self._blocks.append(self._made(0, number, number + 1, block))
            self.waiting = self.waiting.cut(law.block)
            self._merge()
            self._learn()

    def _made(self, level: int, start: int, end: int, entries: Entries) -> Block:
        """A block with its entries as its file will have them, whenever it is read again."""
        arrays = entries.arrays(self._codec)
        entries = Entries.of(arrays, self._codec, self._model, "a new block")
        return Block(level, start, end, entries, None, arrays)

    def _merge(self) -> None:
        while (at := levels.merge([b.level for b in self._blocks])) is not None:
            old, new = self._blocks[at : at + 2]
            level = old.level + 1
            both = Entries.joined([self.of(old), self.of(new)]).thinned(self._settings.law.keep(level))
            self._blocks[at : at + 2] = [self._made(level, old.start, new.end, both)]

    def _learn(self) -> None:
        """Where the codec is to be learned, and enough is held: learns it, and stores all blocks by it."""
        codec = CODECS[self._settings.codec]
        held = sum(len(b.entries) if b.segment is None else b.segment.entries for b in self._blocks)
        if not isinstance(codec, Learned) or self._learned is not None or held < codec.least:
            return
        every, m = [self.of(b) for b in self._blocks], self._model
        self._learned = codec.fit(*(np.concatenate([getattr(e, x) for e in every], axis=2) for x in "kv"))
        self._codec = codecs.of(self._settings.codec, self._learned, (m.layers, m.heads, m.size), "new codes")
        self._blocks = [self._made(b.level, b.start, b.end, e) for b, e in zip(self._blocks, every)]

    def of(self, block: Block) -> Entries:
        """The entries of a block."""
        if block.entries is None:
            where = str(self._store.directory / block.segment.file)
            arrays = self._store.read(block.segment.file)
            arrays = {name: x for name, x in arrays.items() if name not in INDEX}
            found = Entries.of(arrays, self._codec, self._model, where)
            if len(found) != block.segment.entries:
                sizes = list(found.k.shape)
                raise AtomError(f"{where}: holds entries of shape {sizes}, which the manifest does not name")
            block.entries = found
        return block.entries

    def all(self) -> list[Entries]:
        """All entries, block by block, then those that wait."""
        return [*map(self.of, self._blocks), self.waiting]

    def forget(self, source: int) -> None:
        """Leaves out the entries of a source; blocks stay where they are. A codec is learned anew from what is left,
        which loses nothing of that; where it is too little, entries are float16 until there is more."""
        every, anew = [self.of(b) for b in self._blocks], self._learned is not None
        if anew:
            self._learned = self.codes = None
            self._codec, _ = codec_of(self._store, dataclasses.replace(self._manifest, codes=None))
        for i, (block, entries) in enumerate(zip(self._blocks, every)):
            if anew or (entries.source == source).any():
                self._blocks[i] = self._made(block.level, block.start, block.end, entries.without(source))
        self.waiting = self.waiting.without(source)
        self._learn()

    def files(self, number: int) -> tuple[tuple[Segment, ...], dict[str, dict[str, np.ndarray]], int]:
        """The segments of a manifest, the arrays of those files that aren't there yet (`codes`, too), and the number
        after them. number: of the first new file."""
        files: dict[str, dict[str, np.ndarray]] = {}
        for block in self._blocks:
            if block.segment is None:
                name = f"seg-{number:08d}.safetensors"
                # Of blocks alone that weren't merged before they were written.
                files[name] = block.arrays | index(block.entries.k, block.arrays)
                block.arrays = None
                block.segment = Segment(name, block.level, block.start, block.end, len(block.entries))
                number += 1
        if self._learned is not None and self.codes is None:
            self.codes = f"codes-{number:08d}.safetensors"
            files[self.codes], number = self._learned, number + 1
        return tuple(b.segment for b in self._blocks), files, number
