"""Checksums of everything in a directory, so that what has rotted on a disk is seen before it is used."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atom_jax.files import open_regular, read_regular
from atom_jax.typing import AtomError

FILE = "checksums.json"
# Orbax writes it once more when the checkpoint is complete.
_REWRITTEN = "_CHECKPOINT_METADATA"
_BLOCK = 1 << 22
_THREADS = 4


class Damaged(AtomError):
    """A file is not what was written: it is missing, shorter, changed or unreadable."""


def write(directory: Path) -> None:
    """Writes FILE: {"crc32": {path: [bytes, CRC-32]}} of all files below `directory`. OSError where that fails."""
    files = sorted(
        p for p in directory.rglob("*") if p.is_file() and p not in (directory / FILE, directory / _REWRITTEN)
    )
    with ThreadPoolExecutor(_THREADS) as threads:
        found = dict(zip([p.relative_to(directory).as_posix() for p in files], threads.map(_crc32, files)))
    (directory / FILE).write_text(json.dumps({"crc32": found}, indent=0) + "\n", "utf-8")


def verify(directory: Path, parts: Sequence[str] | None = None) -> int:
    """Reads the files that FILE lists, those below `parts` only where parts are given, and returns their bytes; 0 for
    a directory from before there were checksums.

    Raises Damaged, which names the first file that is missing or differs.
    """
    listed = _listed(directory)
    wanted = {name: tuple(said) for name, said in listed.items() if parts is None or name.split("/")[0] in parts}
    wanted.pop(_REWRITTEN, None)

    def check(name: str) -> int:
        try:
            found = _crc32(directory / name)
        except OSError as e:
            raise Damaged(f"{directory / name} cannot be read ({e.strerror})") from None
        if found != wanted[name]:
            what = "is not what was written: its checksum differs"
            if found[0] != wanted[name][0]:
                what = f"holds {found[0]} bytes, {wanted[name][0]} were written"
            raise Damaged(f"{directory / name} {what}")
        return found[0]

    with ThreadPoolExecutor(_THREADS) as threads:
        return sum(threads.map(check, wanted))


@contextlib.contextmanager
def verified(directory: Path, parts: Sequence[str] | None = None) -> Iterator[None]:
    """Runs `verify` beside the block, and ends when both have. Damage comes before what it made go wrong."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(verify, directory, parts)
        try:
            yield
        finally:
            future.result()


def _listed(directory: Path) -> dict[str, Any]:
    try:
        text = read_regular(directory / FILE).decode("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        raise Damaged(f"{directory / FILE} cannot be read ({e})") from None
    try:
        listed = json.loads(text)["crc32"]
        if all(len(said) == 2 and type(said[0]) is type(said[1]) is int for said in listed.values()):
            return listed
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise Damaged(f"{directory / FILE} is not a table of checksums")


def _crc32(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
