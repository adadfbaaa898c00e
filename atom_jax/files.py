"""Opening files that somebody else made, and writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """A name for a file that the block writes: it takes the place of `path` whole when the block ends, or not at all.

    It ends as `path` does. Where that is a link, the file that it leads to is replaced. OSError, which names `path`,
    where there is a directory, a pipe or a device, and for whatever the system refuses."""
    what = os.fspath(path)
    try:
        target = Path(os.path.realpath(what))
        if os.path.lexists(target) and not target.is_file():
            raise OSError(errno.EINVAL, "it is a directory, a pipe or a device, not a regular file", what)
        part = target.with_name(f".new-{uuid.uuid4().hex[:12]}-{target.name}")
    except ValueError as e:  # a NUL in the name
        raise OSError(errno.EINVAL, str(e), what) from None
    try:
        yield part
        # A rename may reach the disk before the data does: a power cut would then leave an empty file in place.
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as e:
        raise OSError(e.errno or errno.EIO, e.strerror or str(e), what) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file whole, in place of one that is there, or not at all. OSError where that fails."""
    with replaced(path) as part:
        part.write_text(text, "utf-8", newline="")


def check_writable(path: str | os.PathLike) -> None:
    """Makes the folder of a file that will be written later. OSError, which names `path`, where that will not be."""
    what = os.fspath(path)
    try:
        if not what or what.endswith(os.sep) or Path(what).name in ("", ".."):
            raise OSError(errno.EISDIR, "it is the name of a directory, not of a file", what)
        Path(what).parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        raise OSError(errno.EINVAL, getattr(e, "strerror", None) or str(e), what) from None
    with contextlib.suppress(_Unneeded), replaced(what) as part:
        part.touch()
        raise _Unneeded


class _Unneeded(Exception):
    """Nothing is to be replaced."""
