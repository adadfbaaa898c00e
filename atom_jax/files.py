"""Opening files that somebody else made, and putting files where a user asks for them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Of all arrays in an .npz file: a small file can say that it holds any number of zeros.
MOST_BYTES = 1 << 34


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading bytes. OSError for whatever `open` refuses, and for what is not a regular file: a pipe
    may never begin, and a device may never end."""
    try:
        # Without O_NONBLOCK already opening a pipe waits for its other end.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as e:  # a NUL in the name
        raise OSError(errno.EINVAL, str(e), str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file", str(path))
    return file


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a regular file; OSError as for `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def check_output(path: str | os.PathLike, parents: bool = False) -> None:
    """Raises the OSError with which `replaced` would end, as far as it can be told before there is anything to write:
    for what is there and no regular file, such as a device, which a rename would replace like any other, and for a
    directory that is missing or takes no files. parents: missing ones are going to be made."""
    try:
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(path).st_mode
            if stat.S_ISDIR(there):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(there):
                raise OSError(errno.EINVAL, "something else than a regular file is there", str(path))
        folder = Path(os.path.realpath(path)).parent
        while parents and not folder.exists():
            folder = folder.parent
        mode = os.stat(folder).st_mode
    except ValueError as e:  # a NUL in the name
        raise OSError(errno.EINVAL, str(e), str(path)) from None
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextlib.contextmanager
def replaced(path: str | os.PathLike, parents: bool = False) -> Iterator[Path]:
    """Yields the path of an empty file to write to, whose name ends like this one. When the block succeeds it takes
    the place of `path` (of what a link points to), whole and on the disk; else what was there stays. parents: missing
    directories are made. OSError where that fails, and as of `check_output`."""
    check_output(path, parents)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".new-{uuid.uuid4().hex}{target.suffix}")
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode & 0o777  # what the umask allows; some writers make files private
        yield part
        part.chmod(mode)
        # A rename may reach the disk before the data does: a power cut would then leave an empty file in place.
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, parents: bool = False) -> None:
    """Writes a UTF-8 file; as of `replaced`."""
    with replaced(path, parents) as part:
        part.write_text(text, "utf-8", newline="")


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. OSError as for `open_regular`; ValueError, of one line, for what is no such file,
    holds objects, which are pickles, or takes more than MOST_BYTES."""
    try:
        with open_regular(path) as file:
            size = sum(info.file_size for info in zipfile.ZipFile(file).infolist())
            if size > MOST_BYTES:
                raise ValueError(f"it takes {size:,} bytes, at most {MOST_BYTES:,} are read")
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
    except OSError:
        raise
    except (ValueError, EOFError, TypeError, SyntaxError, RuntimeError, MemoryError, OverflowError, struct.error,
            zipfile.BadZipFile, zlib.error, tokenize.TokenError) as e:  # fmt: skip
        raise ValueError(" ".join(str(e).split())[:160] or type(e).__name__) from None
    if wrong := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
        raise ValueError(f"{wrong[0][:60]} is no array")
    return arrays
