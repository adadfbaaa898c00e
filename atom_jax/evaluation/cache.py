"""What makes an evaluation resumable: the scores of single items in a file, under a key for what produced them."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from atom_jax.evaluation.encode import Item
from atom_jax.evaluation.loglik import Score
from atom_jax.files import check_output, write_text
from atom_jax.typing import AtomError


def key(model: str, task: str, items: Sequence[Item], batch_tokens: int) -> str:
    """16 hex digits for one task on one model: the items themselves carry the data, the settings and the tokenizer.
    batch_tokens belongs to it because other batches round differently."""
    digest = hashlib.sha256(f"{model} {task} {batch_tokens}\n".encode())
    for item in items:
        digest.update(b"%d %d " % (item.start, len(item.ids)) + item.ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


class Lines:
    """A JSON-lines file to which rows are added; path None keeps nothing. fields: what every row has, by name, and of
    which type.

    A last line that was cut short by an interruption is dropped.
    """

    def __init__(self, path: pathlib.Path | None, fields: Mapping[str, type]):
        """Reads what is there into `rows`. Raises AtomError when the file cannot be read or written."""
        self.file, self.rows, self._fields = None, [], fields
        if path is None:
            return
        try:
            check_output(path, parents=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")  # noqa: SIM115 (closed by close)
            self._load()
        except OSError as e:
            raise AtomError(f"{path}: {e.strerror}") from None
        except (ValueError, RecursionError):
            raise AtomError(f"{path} is not a cache of evaluation items: delete it or choose another --out") from None

    def _load(self) -> None:
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                self.file.truncate(whole)
                break
            whole += len(line)
            row = json.loads(line)
            if not isinstance(row, dict) or any(
                type(row.get(name)) is not kind for name, kind in self._fields.items()
            ):
                raise ValueError("not a row")
            self.take(row)

    def take(self, row: dict[str, Any]) -> None:
        """Called with every row of the file."""
        self.rows.append(row)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes rows at the end of the file. Raises AtomError when they cannot be written."""
        if self.file is None:
            return
        try:
            self.file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self.file.flush()
        except OSError as e:
            raise AtomError(f"{self.file.name}: {e.strerror}") from None

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()


class ItemCache(Lines):
    """Scores of items, added batch by batch: lines {"key", "item", "logprob", "greedy"}; those of other keys are left
    alone."""

    def __init__(self, path: pathlib.Path | None, key: str):
        """Reads what is there under `key`. Raises AtomError when the file cannot be read or written."""
        self.key, self.done = key, dict[int, Score]()
        super().__init__(path, {"key": str, "item": int, "logprob": float, "greedy": bool})

    def take(self, row: dict[str, Any]) -> None:
        """Remembers a score of this key."""
        if row["key"] == self.key:
            self.done[row["item"]] = Score(row["logprob"], row["greedy"])

    def add(self, items: Sequence[int], scores: Sequence[Score]) -> None:
        """Remembers the scores of a batch. Raises AtomError when they cannot be written."""
        self.done.update(zip(items, scores))
        self.append({"key": self.key, "item": i, **s._asdict()} for i, s in zip(items, scores))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a whole JSON file or leaves the old one. Raises AtomError when it cannot be written."""
    try:
        write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", parents=True)
    except OSError as e:
        raise AtomError(f"{path}: {e.strerror}") from None
