"""The steps of a run on the disk: which there are, which are whole, which stay."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from atom_jax.checkpoint import checksums
from atom_jax.checkpoint.checksums import Damaged
from atom_jax.files import read_regular


@dataclasses.dataclass(frozen=True)
class Newest:
    """Orbax's question which steps stay: the newest `keep`, and the newest that is not suspect."""

    keep: int
    directory: pathlib.Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """True for those that stay. checkpoints: from the oldest to the newest."""
        found = [c.step for c in checkpoints]
        # The last one is being saved.
        good = [step for step in found[:-1] if not is_suspect(self.directory / str(step))]
        kept = {*found[-self.keep :], *good[-1:]} if not set(good) & set(found[-self.keep :]) else found[-self.keep :]
        return [step in kept for step in found]


def steps(directory: pathlib.Path) -> list[int]:
    """Numbers of the steps saved in a directory, the newest first; what is not complete has another name."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.is_dir() and re.fullmatch(r"0|[1-9][0-9]{0,17}", p.name)]
    return sorted(map(int, names), reverse=True)


def complete(path: pathlib.Path, parts: Sequence[str]) -> int:
    """Raises Damaged where `parts` of a checkpoint are absent, or anything in it is not what was written; returns the
    bytes verified."""
    for name in parts:
        if not (path / name).is_dir():
            raise Damaged(f"{path} has no {name}")
    return checksums.verify(path)


def is_suspect(path: pathlib.Path) -> bool:
    """Whether a step was saved while steps went wrong."""
    try:
        said = json.loads(read_regular(path / "_CHECKPOINT_METADATA"))
        return bool(said["custom_metadata"]["suspect"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
