"""What makes an evaluation resumable: the scores of single items in a file, under a key for what produced them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import pathlib
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atom_jax.evaluation.encode import Item
from atom_jax.evaluation.loglik import Score
from atom_jax.fields import read_json
from atom_jax.files import check_output, open_regular, write_text
from atom_jax.typing import AtomError


def key(model: str, task: str, items: Sequence[Item], batch_tokens: int) -> str:
    """16 hex digits for one task on one model: the items themselves carry the data, the settings and the tokenizer.
    batch_tokens belongs to it because other batches round differently."""
    digest = hashlib.sha256(f"{model} {task} {batch_tokens}\n".encode())
    for item in items:
        digest.update(b"%d %d " % (item.start, len(item.ids)) + item.ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


class Lines:
    """A JSON-lines file to which rows are added, by one process at a time; path None keeps nothing. fields: what
    every row has, by name, and of which type.

    Every row has a CRC-32 of what it says ("crc"; in rows of older files there is none). A last line that was cut
    short by an interruption is dropped; other lines that are damaged are said aloud and count as absent.
    """

    def __init__(self, path: pathlib.Path | None, fields: Mapping[str, type]):
        """Reads what is there into `rows`. Raises AtomError when the file cannot be read or written, holds something
        else, or belongs to another process."""
        self.file, self.rows, self._fields = None, [], fields
        if path is None:
            return
        try:
            check_output(path, parents=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                open_regular(path).close()
            self.file = open(path, "a+b")  # noqa: SIM115 (closed by close)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            damaged = self._load()
        except BlockingIOError:
            self.close()
            raise AtomError(
                f"{path}: another evaluation writes there: wait for it, or choose another --out"
            ) from None
        except OSError as e:
            self.close()
            raise AtomError(f"{path}: {e.strerror}") from None
        if damaged and not self.rows:
            self.close()
            raise AtomError(f"{path} is not a cache of evaluation items: delete it or choose another --out")
        if damaged:
            print(f"{path}: {damaged} damaged lines are left out and measured again", file=sys.stderr)

    def _load(self) -> int:
        """Takes the rows; returns how many lines are none."""
        self.file.seek(0)
        damaged = whole = 0
        for line in self.file:
            row = _row(line)
            if not line.endswith(b"\n") and (self.rows or _began(line)):
                self.file.truncate(whole)
                break
            whole += len(line)
            if row is None or any(type(row.get(name)) is not kind for name, kind in self._fields.items()):
                damaged += 1
            else:
                self.take(row)
                self.rows.append(row)
        return damaged

    def take(self, row: dict[str, Any]) -> None:
        """Called with every row of the file."""

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes rows at the end of the file. Raises AtomError when they cannot be written."""
        if self.file is None:
            return
        try:
            self.file.write("".join(json.dumps(row | {"crc": _crc(row)}) + "\n" for row in rows).encode())
            self.file.flush()
        except OSError as e:
            raise AtomError(f"{self.file.name}: {e.strerror}") from None

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None where it is none, or not what was written."""
    try:
        row = json.loads(line)
        crc = row.pop("crc", None)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    return row if crc is None or crc == _crc(row) else None


def _crc(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _began(line: bytes) -> bool:
    """Whether a line without an end is the beginning of a row, and nothing that is whole without one."""
    try:
        return isinstance(json.loads(line), dict) and b'"crc"' in line
    except (ValueError, RecursionError):
        return line[:2] == b'{"'


class ItemCache(Lines):
    """Scores of items, added batch by batch: lines {"key", "item", "logprob", "greedy"}; those of other keys are left
    alone."""

    def __init__(self, path: pathlib.Path | None, key: str):
        """Reads what is there under `key`. Raises AtomError when the file cannot be read or written."""
        self.key, self.done = key, dict[int, Score]()
        super().__init__(path, {"key": str, "item": int, "logprob": float, "greedy": bool})

    def take(self, row: dict[str, Any]) -> None:
        """Remembers a score of this key."""
        if row["key"] == self.key and math.isfinite(row["logprob"]):
            self.done[row["item"]] = Score(row["logprob"], row["greedy"])

    def add(self, items: Sequence[int], scores: Sequence[Score]) -> None:
        """Remembers the scores of a batch. Raises AtomError when they cannot be written."""
        self.done.update(zip(items, scores))
        self.append({"key": self.key, "item": i, **s._asdict()} for i, s in zip(items, scores))


def numbers(value: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether something that was read from JSON is a list (of lists) of finite numbers, of this shape if one is
    given; () is a number."""
    try:
        found = np.array(value)
    except ValueError:
        return False
    return found.dtype.kind in "biuf" and bool(np.isfinite(found).all()) and shape in (None, found.shape)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a whole JSON file or leaves the old one; numbers that are not finite are null. Raises AtomError when it
    cannot be written."""
    try:
        write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", parents=True)
    except OSError as e:
        raise AtomError(f"{path}: {e.strerror}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_out(path: pathlib.Path) -> None:
    """Raises AtomError, before anything is computed, for a file of results that will not be written, and for one that
    would take the place of what is no file of results."""
    where = f"--out={path}"
    if path.suffix.lower() == ".png":
        raise AtomError(f"{where}: results are a JSON file, beside which pictures get names that end in .png")
    for file in (path, path.with_suffix(".png")) if path.name else (path,):
        try:
            check_output(file, parents=True)
        except OSError as e:
            raise AtomError(f"--out={file}: {e.strerror}") from None
    if path.exists():
        try:
            known = {*read_json(path)} >= {"fingerprint", "tasks"}
        except AtomError:
            known = False
        if not known:
            raise AtomError(f"{where}: there is a file that holds no results of an evaluation; name another one")
