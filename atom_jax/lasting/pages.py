"""Entries that stay on disk: pages of 32 of a block, whose mean keys and checksums are known, and which are read when
they are chosen."""

from __future__ import annotations

import itertools
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax.checkpoint.checksums import Damaged
from atom_jax.kvcache.lasting.paged import FETCHES
from atom_jax.lasting import codec as codecs
from atom_jax.lasting.blocks import Entries, codec_of
from atom_jax.lasting.store import Manifest, Segment, Store
from atom_jax.typing import AtomError

_NUMBERS = itertools.count()


class Pages:
    """All pages of a memory: those of its segments, then those of what waits. `entries` in all; sizes: i32 [p],
    entries of each. failed: why a page could not be read, once one could not. Those that a layer fetched last are
    held: of what is chosen anew, most was chosen before."""

    def __init__(self, store: Store, manifest: Manifest, waiting: Entries | None, known: Pages | None = None):
        """known: of an earlier state, whose open files are taken over. AtomError for files that are damaged."""
        files = {} if known is None else known.files
        wanted = [s for s in manifest.segments if s.entries]
        codec, _ = codec_of(store, manifest)
        self.files = {s.file: files.get(s.file) or _Segment(store, s, manifest, codec) for s in wanted}
        parts: list[Any] = list(self.files.values())
        self._parts = parts + ([_Waiting(waiting)] if waiting is not None and len(waiting) else [])
        self._where = [(part, i) for part in self._parts for i in range(len(part.sizes))]
        self.sizes = np.array([n for part in self._parts for n in part.sizes], np.int32)
        self.entries, self.failed = int(self.sizes.sum()), None
        self._latest: dict[int, dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]] = {}
        self.number = next(_NUMBERS)
        FETCHES[self.number] = self

    def marks(self) -> np.ndarray:
        """float16 [l, h, p, k], the mean keys."""
        return np.concatenate([part.marks for part in self._parts], axis=2)

    def __call__(self, layer: int, pages_bhp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of pages, as `FETCHES` says."""
        size = self._parts[0].marks.shape[-1]
        k, v = (np.zeros((*pages_bhp.shape, codecs.PAGE, size), np.float16) for _ in range(2))
        before, latest = self._latest.get(layer, {}), {}
        try:
            for at, page in np.ndenumerate(pages_bhp):
                if page < len(self._where):
                    key = at[1], int(page)
                    if key not in latest:
                        part, number = self._where[page]
                        latest[key] = before.get(key) or part.page(layer, at[1], number)
                    one_k, one_v = latest[key]
                    k[at][: len(one_k)], v[at][: len(one_v)] = one_k, one_v
            self._latest[layer] = latest
        except AtomError as e:
            # Inside a program nothing can be raised without a traceback.
            self.failed = self.failed or e
            k[:], v[:] = np.nan, np.nan
        return k, v


class _Segment:
    """The pages of a block on disk. All but its keys and values is held."""

    def __init__(self, store: Store, segment: Segment, manifest: Manifest, codec: codecs.Codec):
        self._codec, self._count = codec, segment.entries
        self._path = Path(store.directory / segment.file)
        self._file, found, arrays = store.opened(segment.file, ("k", "v"))
        weakref.finalize(self, self._file.close)
        m = manifest.model
        shape = (m.layers, m.heads, segment.entries, m.size)
        there = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        if codec.misfit(shape, there | {name: place[:2] for name, place in found.items()}) is not None:
            raise AtomError(
                f"{self._path}: holds entries of another shape than {list(shape)}, which the manifest names"
            )
        self._found, self._heads = found, m.heads
        if codecs.INDEX - arrays.keys():
            # Of an older version.
            stored = store.read(segment.file)
            arrays |= codecs.index(codec.decode(stored)[0], stored)
        self._arrays = {name: arrays[name] for name in codec.small | codecs.INDEX}
        self.sizes = codecs.page_sizes(segment.entries)
        self.marks, pages = self._arrays["mark"], (*shape[:2], len(self.sizes))
        crcs, right = self._arrays["page_crc"], ((*pages, m.size), np.float16, (*pages, 2), np.int32)
        if (self.marks.shape, self.marks.dtype, crcs.shape, crcs.dtype) != right:
            raise AtomError(f"{self._path}: its pages don't fit its entries")

    def page(self, layer: int, head: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values float16 [n, k]. Damaged where they are not what was written, or no numbers."""
        first, count = number * codecs.PAGE, self.sizes[number]
        one = {}
        for i, name in enumerate("kv"):
            shape, dtype, offset = self._found[name]
            bytes_row = dtype.itemsize * shape[-1]
            start = offset + ((layer * self._heads + head) * self._count + first) * bytes_row
            try:
                data = os.pread(self._file.fileno(), count * bytes_row, start)
            except OSError as e:
                raise Damaged(f"{self._path}: cannot be read ({e.strerror})") from None
            if zlib.crc32(data) != int(self._arrays["page_crc"][layer, head, number, i]) & 0xFFFFFFFF:
                raise Damaged(f"{self._path}: page {number} is not what was written: its checksum differs")
            one[name] = np.frombuffer(data, dtype).reshape(1, 1, count, -1)
        for name in self._codec.small:
            at = slice(number, number + 1) if name in self._codec.by_page else slice(first, first + count)
            one[name] = self._arrays[name][layer : layer + 1, head : head + 1, at]
        k, v = self._codec.decode(one, (slice(layer, layer + 1), slice(head, head + 1)))
        if not (np.isfinite(k).all() and np.isfinite(v).all()):
            raise Damaged(f"{self._path}: page {number} holds NaN or infinite values")
        return k[0, 0], v[0, 0]


class _Waiting:
    """The pages of entries that wait for their block, which are held."""

    def __init__(self, entries: Entries):
        self._entries, self.sizes = entries, codecs.page_sizes(len(entries))
        self.marks = codecs.marks(entries.k)

    def page(self, layer: int, head: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `_Segment`."""
        at = slice(number * codecs.PAGE, (number + 1) * codecs.PAGE)
        return self._entries.k[layer, head, at], self._entries.v[layer, head, at]
