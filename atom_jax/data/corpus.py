"""Documents with random access: how many there are, how long they are, and any part of one."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from atom_jax.files import open_regular
from atom_jax.typing import AtomError

PACKED = {".gz": gzip.open, ".xz": lzma.open}
BOM = codecs.BOM_UTF8  # some editors put it before a text, of which it is no part
_READ = 1 << 20
# Packed text is rarely a tenth of itself; a file that says to be 200 times as long is not a text.
_EXPANSION, _HARMLESS = 200, 1 << 26
_SAMPLE = 32


# (a record, where it is, for messages) -> the document in it.
Take = Callable[[Any, str], bytes]


class Corpus(Protocol):
    """A sequence of UTF-8 documents.

    what:  the source's name for messages.
    sizes: i64 [n] bytes of every document, or None where finding out means reading everything.
    crc:   CRC-32 of the text, wherever it lies: what tells one text from another.
    Where a program makes the documents, of which there are more than anybody reads, `endless` is True.
    Where parts of a document count more than the rest, `marked(i)` gives {"text": bytes, "answers": i64 [n, 2], where
    they begin and end, "weight": float, how many times their tokens count in the loss}; it is never cut.
    """

    what: str
    sizes: np.ndarray | None
    crc: int

    def __len__(self) -> int: ...

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """Returns bytes start:stop of document i."""
        ...


class Texts:
    """Documents held in memory."""

    def __init__(self, what: str, texts: Sequence[bytes]):
        self.what = what
        self.texts = [t for t in texts if t]
        self.sizes = np.array([len(t) for t in self.texts], np.int64)
        self.crc = crc_of(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        return self.texts[i][start:stop]


class Files:
    """One document per text file, read when asked for. Empty files are left out, others must be UTF-8; a mark that
    says so, at the beginning, is no part of the document."""

    def __init__(self, what: str, paths: Sequence[pathlib.Path]):
        self.what = what
        found = [(p, *check_file(p)) for p in paths]
        self.files = [(path, first) for path, first, size, _ in found if size]
        self.sizes = np.array([size for _, _, size, _ in found if size], np.int64)
        self.crc = crc_of(b"%d %d " % (size, crc) for _, _, size, crc in found if size)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        path, first = self.files[i]
        with open_file(path) as f:
            f.seek(first + start)
            return f.read(-1 if stop is None else stop - start)


class JsonLines:
    """One document per line of a plain .jsonl file, what `take` finds in it, parsed again when asked for."""

    def __init__(self, path: pathlib.Path, take: Take):
        self.what = str(path)
        self.path = path
        self.take = take
        starts, sizes, at, self.crc = [], [], 0, 0
        with open_file(path) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    size = len(json_text(line, take, f"{path}, line {number}"))
                    if size:
                        starts.append((at, len(line)))
                        sizes.append(size)
                at, self.crc = at + len(line), zlib.crc32(line, self.crc)
        self.lines = np.array(starts, np.int64).reshape(-1, 2)
        self.sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        at, length = self.lines[i]
        with open_file(self.path) as f:
            f.seek(at)
            return json_text(f.read(length), self.take, f"{self.path}, byte {at}")[start:stop]


class Records:
    """One document per record of a data source (array_record, tfds); each is checked when it is read.

    crc is that of _SAMPLE records spread over the source and of their number: reading all would take too long.
    """

    sizes = None

    def __init__(self, what: str, source, field: str | None = None):
        """source: len() and [] giving bytes, or mappings whose `field` is bytes."""
        self.what = what
        self.source = source
        self.field = field

    @functools.cached_property
    def crc(self) -> int:
        n = len(self)
        chosen = sorted({i * (n - 1) // max(_SAMPLE - 1, 1) for i in range(min(_SAMPLE, n))})
        return crc_of([b"%d " % n, *map(self.read, chosen)])

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        try:
            record = self.source[i]
        except Exception as e:  # the readers of record files raise many kinds
            raise AtomError(f"{self.what}, record {i} cannot be read: {one_line(e)}.") from None
        if self.field is not None:
            if self.field not in record:
                raise AtomError(f"{self.what} has no feature {self.field!r}: it has {', '.join(sorted(record))}.")
            record = record[self.field]
        if not isinstance(record, bytes):
            raise AtomError(f"{self.what}, record {i}: the text must be bytes, found {type(record).__name__}.")
        check_utf8(record, f"{self.what}, record {i}")
        return record[start:stop]


class Subset:
    """Some documents of a corpus, in the order of `indices`."""

    def __init__(self, corpus: Corpus, indices: Sequence[int]):
        self.what = corpus.what
        self.corpus = corpus
        self.indices = indices
        self.crc = corpus.crc
        self.sizes = None if corpus.sizes is None else corpus.sizes[np.array(indices, np.int64)]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        return self.corpus.read(self.indices[i], start, stop)


class Spans:
    """Parts of documents: span i is bytes start:stop of a document, and counts as a document."""

    def __init__(self, corpus: Corpus, spans: Sequence[tuple[int, int, int]]):
        """spans: (document number, start, stop) each."""
        self.what = corpus.what
        self.corpus = corpus
        self.spans = spans
        self.sizes = np.array([stop - start for _, start, stop in spans], np.int64)
        self.crc = corpus.crc

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        doc, begin, end = self.spans[i]
        return self.corpus.read(doc, begin + start, end if stop is None else min(end, begin + stop))


class Joined:
    """Several corpora one after the other."""

    def __init__(self, what: str, parts: Sequence[Corpus]):
        self.what = what
        self.parts = parts
        self.ends = np.cumsum([len(p) for p in parts])
        known = all(p.sizes is not None for p in parts)
        self.sizes = np.concatenate([p.sizes for p in parts]) if known else None
        self.crc = crc_of(b"%d " % p.crc for p in parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        part = int(np.searchsorted(self.ends, i, side="right"))
        first = 0 if part == 0 else int(self.ends[part - 1])
        return self.parts[part].read(i - first, start, stop)


@contextlib.contextmanager
def open_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes; what the system refuses, then or later, becomes an AtomError."""
    try:
        with open_regular(path) as f:
            yield f
    except OSError as e:
        raise AtomError(f"{path} cannot be read: {e.strerror or e}.") from None


def packing(path: pathlib.Path) -> Callable[..., BinaryIO] | None:
    """What opens a packed file, by its name in whatever case; None for others."""
    return PACKED.get(f".{path.name.rpartition('.')[2].lower()}")


def read_packed(path: pathlib.Path) -> bytes:
    """Returns the content of a .gz or .xz file; AtomError when it is damaged, or 200 times as long as the file."""
    with open_file(path) as raw:
        most = max(_HARMLESS, _EXPANSION * os.fstat(raw.fileno()).st_size)
        try:
            with packing(path)(raw, "rb") as f:
                text = f.read(most + 1)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
            raise AtomError(f"{path} cannot be decompressed: {e}.") from None
    if len(text) > most:
        raise AtomError(f"{path} holds more than {most:,} bytes, {_EXPANSION} times its size: that is no text.")
    return text


def check_utf8(text: bytes, where: str) -> None:
    """Raises an AtomError with the byte offset unless `text` is UTF-8."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise AtomError(f"{where} is not UTF-8 at byte {e.start}.") from None


def crc_of(texts: Iterable[bytes]) -> int:
    """Returns the CRC-32 of texts one after the other."""
    return functools.reduce(lambda crc, text: zlib.crc32(text, crc), texts, 0)


def check_file(path: pathlib.Path) -> tuple[int, int, int]:
    """Returns where the text of a file begins, its size in bytes and the file's CRC-32; AtomError with the byte
    offset if it is not UTF-8."""
    decoder, size, crc = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with open_file(path) as f:
        first = len(BOM) if f.read(len(BOM)) == BOM else 0
        f.seek(0)
        while True:
            block = f.read(_READ)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise AtomError(f"{path} is not UTF-8 at byte {size - held + e.start}.") from None
            if not block:
                return first, size - first, crc
            size, crc = size + len(block), zlib.crc32(block, crc)


def json_text(line: bytes, take: Take, where: str) -> bytes:
    """Returns what `take` finds in one line of JSON; AtomErrors begin with `where`."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as e:
        raise AtomError(f"{where} is not UTF-8 at byte {e.start} of the line.") from None
    except (ValueError, RecursionError) as e:
        raise AtomError(f"{where} is not JSON: {one_line(e)}.") from None
    return take(record, where)


def record_text(record: Any, where: str, field: str = "text") -> bytes:
    """Returns the string under `field` of a record as UTF-8; AtomErrors begin with `where`."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise AtomError(f"{where} has no string under the field {field!r}.")
    try:
        return record[field].encode("utf-8")
    except UnicodeEncodeError:
        raise AtomError(f"{where} has a lone surrogate under the field {field!r}.") from None


def one_line(error: Exception) -> str:
    """Returns the message of an exception from elsewhere, short enough for one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
