"""How a command meets its environment: terminals that cannot write every character, full disks, closed pipes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from atom_jax.typing import AtomError


def run(name: str, command: Callable[[], Any]) -> int:
    """Runs a command and returns the exit code: its own, 1 after bad input or what the system refuses (one sentence
    on stderr, which begins with `name`), 130 after Ctrl-C.

    Characters that the terminal does not know are written as escapes. Once the reader of the output is gone, nothing
    more is said."""
    _prepare()
    try:
        try:
            code = command()
        except SystemExit as e:
            code = e.code
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0 if code is None else _complain(name, str(code))
    except (AtomError, flags.Error) as e:
        return _complain(name, str(e))
    except KeyboardInterrupt:
        _complain("", "")
        return 130
    except BrokenPipeError:
        _silence(sys.stdout)
        return 1
    except OSError as e:
        if e.filename is None:
            _silence(sys.stdout)
        return _complain(name, str(AtomError(f"{e.filename or 'the output'}: {e.strerror or e}")))
    except MemoryError as e:
        return _complain(name, f"there is not enough memory ({e})" if str(e) else "there is not enough memory")
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise  # a fault of the program, whose place is to be seen
        return _complain(name, str(AtomError(f"there is not enough memory on the device ({e})")))


def received(read: Callable[[], str]) -> str:
    """What `read`, a method of sys.stdin, returns. Raises AtomError for bytes that are no text."""
    try:
        return read()
    except UnicodeDecodeError as e:
        raise AtomError(f"the input is not valid {e.encoding.upper()} ({e.reason})") from None


def is_utf8() -> bool:
    """Whether the output is written in UTF-8."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def progress(rows: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm on stderr, drawn five times a second for who watches, and twice a minute into a file. options:
    of tqdm."""
    from tqdm import tqdm

    return tqdm(rows, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def _prepare() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # A line of the log that cannot be written would come with a traceback.
    logging.raiseExceptions = False


def _complain(name: str, message: str) -> int:
    try:
        print(f"{name}: {message}" if name else message, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)
    return 1


def _silence(stream: Any) -> None:
    """Sends what a stream still holds nowhere, so that Python does not complain about it on the way out."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
