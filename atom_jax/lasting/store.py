"""A lasting memory on disk: immutable files, and a manifest that names them and is replaced as a whole.

DIR/MEMORY.json            the manifest; what it doesn't name does not exist
DIR/seg-%08d.safetensors   a block's entries      DIR/tail-%08d.safetensors  what waits for a block, and the window
DIR/text-%08d.safetensors  ids of a source        DIR/state-%08d.safetensors its final states, and what followed each
DIR/score-%08d.safetensors a learned score        DIR/codes-%08d.safetensors what the codec has learned
DIR/.lock                  held by the one that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from atom_jax import config
from atom_jax.checkpoint.checksums import Damaged
from atom_jax.checkpoint.lock import locked
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.fields import read_json
from atom_jax.files import open_regular
from atom_jax.kvcache.lasting.levels import Law, levels
from atom_jax.kvcache.lasting.score import LEARNED, SCORES
from atom_jax.lasting.codec import CODECS, Learned
from atom_jax.typing import AtomError

MANIFEST, FORMAT = "MEMORY.json", 1
NEW = ".new-"
# What a memory may be made of: entries in levels, which stand before prompts; states, which say what comes next.
LEVELS, KNN = "levels", "knn"
PARTS = (LEVELS, KNN)
_FILE = re.compile(r"(seg|tail|text|state|score|codes)-\d{8,}\.safetensors")
# What an interrupted commit leaves.
_LEFT = re.compile(rf"\.new-({_FILE.pattern}|MEMORY\.json)")
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A block on disk: its file, level, the blocks of text from `start` to `end` that it covers, entries per head."""

    file: str
    level: int
    start: int
    end: int
    entries: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A text: its number, name, sha256, tokens (those read so far), bytes (0 where ids were given), whether it was
    read to its end, the files with its ids and with its states, and the units that its tokens have made (0 where
    models have none)."""

    id: int
    name: str
    sha256: str
    tokens: int
    bytes: int
    finished: bool
    text: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    units: int = 0

    @property
    def followed(self) -> int:
        """Tokens of which the next one is known."""
        return max(self.tokens - self.finished, 0)


@dataclasses.dataclass(frozen=True)
class Window:
    """The latest part of what was read: the number of its source (-1: there is none), where its first token (or unit,
    of a model with units of its own) stands in that, and how many it has."""

    source: int = -1
    first: int = 0
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that a memory belongs to."""

    family: str
    fingerprint: str
    dtype: str
    layers: int
    heads: int
    size: int

    def __post_init__(self):
        config.check(self, layers=(1, 2**16), heads=(1, 2**16), size=(1, 2**16))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a memory is made. law: what is kept. score: how tokens are compared. part: tokens that are
    read at once, and of the window. sinks: first tokens of a source that stay in view. codec: of stored entries.
    text: "ids": token ids are kept too, "none": they are not. Of a model with units of its own, these count as tokens
    in all but the last. parts: which of PARTS it has."""

    law: Law = dataclasses.field(default_factory=Law)
    score: str = "observed"
    part: int = 512
    sinks: int = 4
    codec: str = "float16"
    text: str = "ids"
    parts: tuple[str, ...] = (LEVELS,)

    def __post_init__(self):
        config.check(self, part=(1, 2**20), sinks=(0, 2**20))
        if self.sinks > self.part:
            raise AtomError(
                f"part: expected {self.sinks} tokens or more, as many as there are sinks, got {self.part}"
            )
        for name, known in (("score", (*SCORES, LEARNED)), ("codec", tuple(CODECS)), ("text", ("ids", "none"))):
            if getattr(self, name) not in known:
                raise AtomError(f"{name}: expected {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.parts or self.parts != tuple(part for part in PARTS if part in self.parts):
            raise AtomError(f"parts: expected {' or '.join(PARTS)}, or both in this order, got {self.parts}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of MEMORY.json. next: number of the next file. written: entries that have come to the buffer.
    waiting: those in the tail."""

    format: int
    model: Model
    settings: Settings
    next: int = 0
    written: int = 0
    waiting: int = 0
    segments: tuple[Segment, ...] = ()
    sources: tuple[Source, ...] = ()
    window: Window = dataclasses.field(default_factory=Window)
    tail: str | None = None
    score: str | None = None
    codes: str | None = None

    @property
    def states(self) -> dict[int, int]:
        """How many states there are of every source, by its number."""
        return {s.id: s.followed if KNN in self.settings.parts else 0 for s in self.sources}

    @property
    def files(self) -> set[str]:
        """All files that it names."""
        named = {s.file for s in self.segments} | {f for s in self.sources for f in (*s.text, *s.state)}
        return named | {f for f in (self.tail, self.score, self.codes) if f is not None}


class Store:
    """The files of one memory. Writing goes through `commit`, under `lock`."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)

    @property
    def exists(self) -> bool:
        """Whether a memory is there. AtomError where something else is."""
        try:
            if (self.directory / MANIFEST).exists():
                return True
            if not self.directory.exists():
                return False
            if not self.directory.is_dir():
                raise AtomError(f"{self.directory}: is a file; a memory is a directory")
            names = sorted(p.name for p in self.directory.iterdir())
        except OSError as e:
            raise AtomError(f"{self.directory}: cannot be read ({e.strerror})") from None
        if others := [name for name in names if not _ours(name)]:
            raise AtomError(f"{self.directory}: holds {others[0]}, and no memory ({MANIFEST}); name a new directory")
        # The first commit has no other file than a score.
        if lost := [n for n in names if _FILE.fullmatch(n) and not n.startswith("score-")]:
            raise AtomError(f"{self.directory}: {MANIFEST} is missing, and {lost[0]} of a memory is there")
        return False

    def manifest(self) -> Manifest:
        """What is there, its files checked for being whole. AtomError naming the file and the field."""
        path = self.directory / MANIFEST
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise AtomError(f"{path}: this version reads format {FORMAT}, not {str(data.get('format'))[:20]}")
        try:
            found = config.from_json(Manifest, data, str(path))
        except RecursionError:
            raise AtomError(f"{path}: not valid JSON") from None
        _check(path, found)
        return found

    def size(self, names: Iterable[str]) -> int:
        """Bytes of files. Missing where one isn't there."""
        total = 0
        for name in names:
            try:
                total += (self.directory / name).stat().st_size
            except OSError:
                raise Missing(f"{self.directory / name}: is missing, and {MANIFEST} names it") from None
        return total

    def read(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a file, compared with their checksums. Damaged (or AtomError) where it is not what was
        written."""
        with self._there(name):
            source = self._source(name)
            return {tensor: source.read(tensor) for tensor in source.infos}

    def opened(
        self, name: str, apart: Iterable[str]
    ) -> tuple[IO[bytes], dict[str, tuple[tuple[int, ...], np.dtype, int]], dict[str, np.ndarray]]:
        """A file, open; shape, dtype and offset in bytes of those of its tensors that are to be read later; and the
        other ones, as by `read`."""
        with self._there(name):
            source = self._source(name)
            later = [tensor for tensor in apart if tensor in source.infos]
            rest = {tensor: source.read(tensor) for tensor in source.infos if tensor not in later}
            places = {x: (source.infos[x].shape, source.infos[x].dtype, source.offset(x)) for x in later}
            return open_regular(self.directory / name), places, rest

    def _source(self, name: str) -> SafetensorsSource:
        source = SafetensorsSource(self.directory / name)
        if source.infos.keys() - source.crcs.keys():
            raise Damaged(f"{self.directory / name}: holds tensors without checksums")
        return source

    @contextlib.contextmanager
    def _there(self, name: str) -> Iterator[None]:
        """Missing where the file isn't there, or another process meanwhile replaces it."""
        self.size([name])
        try:
            yield
        except AtomError:
            self.size([name])
            raise
        except OSError as e:
            self.size([name])
            raise AtomError(f"{self.directory / name}: cannot be read ({e.strerror})") from None

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this is the only one that writes. AtomError where another does."""
        return locked(self.directory)

    def commit(self, manifest: Manifest, files: Mapping[str, Arrays]) -> None:
        """Makes `manifest` what is there, with these new files; afterwards no file is left that it doesn't name.

        Whatever happens on the way, what is there is what was there before or the whole of this. AtomError where the
        disk refuses.
        """
        try:
            self._check_room(files)
            for name, arrays in files.items():
                part = self.directory / f"{NEW}{name}"
                write_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, part)
                _flush(part)
                os.replace(part, self.directory / name)
            _flush_directory(self.directory)
            part = self.directory / f"{NEW}{MANIFEST}"
            text = json.dumps({"format": FORMAT, **config.to_json(manifest)}, indent=1) + "\n"
            part.write_text(text, "utf-8")
            _flush(part)
            os.replace(part, self.directory / MANIFEST)
            _flush_directory(self.directory)
            self._sweep(manifest)
        except OSError as e:
            raise AtomError(f"{self.directory}: the memory could not be written ({e.strerror or e})") from None

    def clean(self, manifest: Manifest) -> None:
        """Removes what an interrupted commit left. For the one that writes. AtomError where that fails."""
        try:
            self._sweep(manifest)
        except OSError as e:
            raise AtomError(f"{self.directory}: cannot be written to ({e.strerror or e})") from None

    def _sweep(self, manifest: Manifest) -> None:
        for path in self.directory.iterdir():
            ours = _FILE.fullmatch(path.name) or _LEFT.fullmatch(path.name)
            if ours and path.name not in manifest.files:
                os.unlink(path)

    def _check_room(self, files: Mapping[str, Arrays]) -> None:
        need = sum(x.nbytes for arrays in files.values() for x in arrays.values())
        free = shutil.disk_usage(self.directory).free
        if free < need + (1 << 20):
            raise AtomError(f"{self.directory}: {need:,} bytes are to be written, and {free:,} are free")


def _check(path: Path, found: Manifest) -> None:
    """Raises AtomError for a manifest that no memory could have."""
    for name in found.files:
        if not _FILE.fullmatch(name):
            raise AtomError(f"{path}: {name[:60]!r} is no name of a file of a memory")
    law, at = found.settings.law, 0
    for s in found.segments:
        right = 0 <= s.level < 31 and (s.start, s.end) == (at, at + (1 << s.level))
        if not right or not 0 <= s.entries <= law.keep(s.level):
            raise AtomError(f"{path}: the segment {s.file} is not as the law has it")
        at = s.end
    if [s.level for s in found.segments] != levels(at):
        raise AtomError(f"{path}: the segments are not those that the law has after {at} blocks")
    numbers, window = [s.id for s in found.sources], found.window
    if len({*numbers, -1}) <= len(numbers) or min(numbers, default=0) < 0:
        raise AtomError(f"{path}: the sources have not each a number of their own")
    if any(min(s.tokens, s.units) < 0 for s in found.sources) or min(found.next, found.written, found.waiting) < 0:
        raise AtomError(f"{path}: a number is negative")
    there = window.source in numbers and found.tail is not None and window.first >= 0
    if window.source != -1 and not (there and 0 <= window.count <= found.settings.part):
        raise AtomError(f"{path}: the window is of no source that is known")
    if found.waiting and found.tail is None:
        raise AtomError(f"{path}: entries wait, and no tail is named")
    if found.codes is not None and not isinstance(CODECS[found.settings.codec], Learned):
        raise AtomError(f"{path}: names codes, and {found.settings.codec} has none")


class Missing(AtomError):
    """A file that the manifest names isn't there."""


def is_memory(path: str | os.PathLike) -> bool:
    """Whether a memory is at this path."""
    return (Path(path) / MANIFEST).is_file()


def _ours(name: str) -> bool:
    return name == ".lock" or bool(_FILE.fullmatch(name) or _LEFT.fullmatch(name))


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
