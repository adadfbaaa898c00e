"""What kind of text a file holds, and the kinds that are read whole: packed files, .json, .csv and .parquet.

take: what finds the document in a record (`corpus.Take`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from atom_jax.data.corpus import (
    BOM,
    Corpus,
    JsonLines,
    Take,
    Texts,
    check_utf8,
    json_text,
    one_line,
    open_file,
    packing,
    read_packed,
)
from atom_jax.typing import AtomError

_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_REFUSED = (".arrow", ".feather", ".orc", ".avro")
# How files of other names begin that are no text.
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
# These names say nothing about what is inside.
_PLAIN = ("", ".txt", ".text", ".data")
_LONGEST_LINE = 1 << 26


def kind_of(path: pathlib.Path) -> str:
    """ "text", "jsonl", "json", "csv", "parquet" or "array_record": by the name in whatever case, else by how the
    file begins.

    Raises AtomError for files of other kinds, with what to do about them.
    """
    suffixes = [s.lower() for s in path.suffixes]
    suffix = next((s for s in reversed(suffixes) if not packing(pathlib.Path(s))), "")
    if ".array_record" in path.name:
        return "array_record"
    if suffix in _KINDS:
        return _KINDS[suffix]
    kind = suffix.removeprefix(".") if suffix in _REFUSED else None
    if packing(path) is None and kind is None:
        with open_file(path) as f:
            head = f.read(1 << 12)
            kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
            if kind is None and suffix in _PLAIN:
                f.seek(0)
                return _json_kind(head.removeprefix(BOM), f.readline(_LONGEST_LINE))
    if kind == "parquet":
        return kind
    if kind in ("gzip", "xz"):
        raise AtomError(f"{path} is packed, but its name does not end in .{'gz' if kind == 'gzip' else 'xz'}.")
    if kind is not None:
        raise AtomError(f"{path} is a {kind} file, which is not read: write its texts as .jsonl.")
    return "text"


def _json_kind(head: bytes, line: bytes) -> str:
    if re.match(rb"\s*\[\s*\{\s*\"", head):
        return "json"
    if not re.match(rb"\{\s*\"", head):
        return "text"
    try:
        return "jsonl" if isinstance(json.loads(line), dict) else "text"
    except (ValueError, RecursionError):
        return "text"


def read_jsonl(path: pathlib.Path, take: Take) -> Corpus:
    """One document per line."""
    if packing(path) is None:
        return JsonLines(path, take)
    lines = read_packed(path).splitlines()
    texts = [json_text(line, take, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    return Texts(str(path), texts)


def read_json(path: pathlib.Path, take: Take) -> Corpus:
    """One document per object of a list, or per line where every line is an object."""
    text = _content(path)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as e:
        if _json_kind(b'{"', text.partition(b"\n")[0]) == "jsonl":
            return read_jsonl(path, take)
        raise AtomError(f"{path} is not JSON: {one_line(e)}.") from None
    return _records(path, parsed if isinstance(parsed, list) else [parsed], take)


def read_csv(path: pathlib.Path, take: Take) -> Corpus:
    """One document per row after the first, which names the columns."""
    rows = csv.DictReader(
        io.StringIO(_content(path).decode("utf-8"), newline=""),
        delimiter="\t" if ".tsv" in path.name.lower() else ",",
        strict=True,
    )
    before = csv.field_size_limit(2**31 - 1)
    try:
        return _records(path, list(rows), take)
    except csv.Error as e:
        raise AtomError(f"{path}, row {rows.line_num} is not CSV: {one_line(e)}.") from None
    finally:
        csv.field_size_limit(before)


def read_parquet(path: pathlib.Path, take: Take) -> Corpus:
    """One document per row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise AtomError(f"{path} needs pyarrow: pip install 'atom-jax[parquet]'.") from None
    try:
        with contextlib.nullcontext(io.BytesIO(read_packed(path))) if packing(path) else open_file(path) as f:
            parts = parquet.ParquetFile(f).iter_batches()
            return _records(path, (row for part in parts for row in part.to_pylist()), take)
    except (pyarrow.ArrowException, OSError) as e:
        raise AtomError(f"{path} is not parquet, or damaged: {one_line(e)}.") from None


def read_packed_text(path: pathlib.Path) -> Corpus:
    """A packed text, one document."""
    return Texts(str(path), [_content(path)])


def _records(path: pathlib.Path, records: Iterable[Any], take: Take) -> Corpus:
    return Texts(str(path), [take(r, f"{path}, entry {n}") for n, r in enumerate(records, 1)])


def _content(path: pathlib.Path) -> bytes:
    """UTF-8 without the mark at its beginning."""
    if packing(path) is not None:
        text = read_packed(path)
        check_utf8(text, f"{path}, decompressed,")
    else:
        with open_file(path) as f:
            text = f.read()
        check_utf8(text, str(path))
    return text.removeprefix(BOM)
