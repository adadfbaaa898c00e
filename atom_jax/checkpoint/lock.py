"""One run at a time in a working directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from atom_jax.typing import AtomError

FILE = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other runs out of an existing directory until the block ends; readers may come and go.

    Process 0 holds a lock of the system (flock), which ends with the process, however that dies, and says in
    DIRECTORY/.lock who has it. Where the file system has no locks, a warning says so. Raises AtomError, in every
    process, where another run holds it.
    """
    problem, file = "", None
    if jax.process_index() == 0:
        problem, file = _take(directory / FILE)
    if jax.process_count() > 1:
        refused = bool(multihost_utils.broadcast_one_to_all(np.array(bool(problem))))
        problem = problem or (f"{directory}: process 0 could not lock it" if refused else "")
    if problem:
        raise AtomError(problem)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _take(path: Path):
    """(what is wrong, "" for nothing; the open file that holds the lock)."""
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open as long as the lock is held)
    except OSError as e:
        return f"{path.parent}: cannot be written to ({e.strerror})", None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = _owner(file.read(1000))
        file.close()
        return f"{path.parent} belongs to another run, {owner}: wait for it, stop it, or use another directory", None
    except OSError as e:
        logging.warning("%s: no lock (%s); nothing keeps a second run out of this directory", path, e.strerror)
        return "", file
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    said = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": began}) + "\n"
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), said.encode())
    except OSError as e:
        file.close()
        return f"{path.parent}: cannot be written to ({e.strerror})", None
    return "", file


def _owner(text: str) -> str:
    try:
        said = json.loads(text)
        return f"process {said['process']:d} on {said['host']:.100} since {said['since']:.30}"
    except (ValueError, KeyError, TypeError):
        return "which has not said who it is"
