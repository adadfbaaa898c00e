"""Opening files that somebody else made."""

from __future__ import annotations

import errno
import os
import stat
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
