"""TensorBoard event files.

tensorboardX's SummaryWriter adds a thread and a process queue that outlive errors: on a full disk their tracebacks
follow the program's own message. So its event file is written directly.
"""

from __future__ import annotations

import pathlib
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

FLUSH_SECONDS = 30


class Board:
    """Scalars and texts by step. Events of a run that was cut off are hidden from `purge_step` on."""

    def __init__(self, directory: pathlib.Path, purge_step: int | None):
        directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds one value to every named curve."""
        for name, value in values.items():
            self._add(step, summary.scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text."""
        self._add(step, summary.text(name, text))

    def close(self) -> None:
        """Writes what is left."""
        self._events.close()

    def _add(self, step: int, content: object) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))
