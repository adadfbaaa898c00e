"""One process per side, driven over pipes: its own thread pool, its own memory, one call at a time."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Refused(Exception):
    """A side said in one sentence why it cannot do what it was asked."""


class Worker:
    """A fresh process that runs `serve` for one side; calling it runs one method there and returns the result.

    python: the interpreter. The process leaves with its parent, but not by the parent's Ctrl-C. Raises Refused where
    the side refuses, and RuntimeError with its traceback or its last words where it fails.
    """

    def __init__(self, module: str, python: str = sys.executable):
        self.module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            text=True,
            start_new_session=True,
        )

    def __call__(self, name: str, *args: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps([name, args]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._last_words(name)) from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words(name))
        kind, value = json.loads(line)
        if kind == "refused":
            raise Refused(value)
        if kind == "failed":
            raise RuntimeError(f"{self.module}.{name} failed:\n{value}")
        return value

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_words(self, name: str) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-12:]
        return "\n".join([f"{self.module} ended with code {code} in {name}; its last words:", *tail])


def serve(side: Any, refusals: tuple[type[Exception], ...]) -> None:
    """Runs calls of the methods of `side` that arrive as lines of JSON, until the pipe closes.

    refusals: exceptions whose message is a sentence for the user.
    """
    # Libraries may print; the pipe is for answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            answer = "done", getattr(side, name)(*args)
        except refusals as e:
            answer = "refused", " ".join(str(e).split())
        except Exception:
            answer = "failed", traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def peak_bytes() -> int:
    """The most memory that this process ever held, in bytes.

    Linux keeps ru_maxrss across exec, so there it may be the parent's; the mark in /proc is of this program only.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        marks = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if marks:
            return int(marks[0][1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
