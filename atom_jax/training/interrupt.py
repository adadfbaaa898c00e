"""Leaving a run in good order: signals, the clock, and one decision for all processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

GO, SAVE, STOP = 0, 1, 2


class Interrupts:
    """Inside this context SIGINT and SIGTERM are only noted in `signal`; a second SIGINT ends the process."""

    def __init__(self):
        self.signal = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            os.write(sys.stderr.fileno(), b"\nleaving at once; the newest finished checkpoint stays\n")
            os._exit(128 + number)
        self.signal = number
        os.write(sys.stderr.fileno(), b"\nfinishing this step and saving; Ctrl-C again leaves at once\n")


class Agreement:
    """What to do after a step, decided for all processes together: the largest wish of any of them.

    With several processes the answer is the one to the question asked a step before, so nobody waits for it.
    """

    def __init__(self, mesh: Mesh, minutes: float):
        self._seconds, self._saved = minutes * 60, time.monotonic()
        self._last = None
        if jax.process_count() > 1:
            self._place = NamedSharding(mesh, P(mesh.axis_names))
            self._mine = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
            self._max = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def ask(self, interrupted: bool) -> int:
        """STOP when some process was interrupted, SAVE when a checkpoint is due by the clock, else GO."""
        due = self._seconds > 0 and time.monotonic() - self._saved > self._seconds
        wish = STOP if interrupted else SAVE if due else GO
        if jax.process_count() == 1:
            return wish
        wishes = np.full(self._mine, wish, np.int32)
        answer = self._max(jax.make_array_from_process_local_data(self._place, wishes))
        answer, self._last = self._last, answer
        return GO if answer is None else int(answer)

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved = time.monotonic()
