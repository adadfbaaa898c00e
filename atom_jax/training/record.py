"""What a run writes down: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from typing import Any

from tqdm import tqdm

from atom_jax.files import read_regular, write_text
from atom_jax.training.board import Board
from atom_jax.typing import AtomError


class Recorder:
    """Writes the metrics of a run into `workdir`. All but process 0 pass enabled=False and write nothing.

    A run that continues at `step` first removes the lines of later steps. unit: what the targets ("tokens" of the
    metrics) of a second are told in, and how many of them make one.
    """

    def __init__(
        self, workdir: pathlib.Path, step: int, steps: int, log_every: int, enabled: bool,
        unit: tuple[str, int] = ("tokens", 1),
    ):  # fmt: skip
        self._every, self._steps, self._enabled = log_every, steps, enabled
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not enabled, dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        # Rates start with the second step: the first one compiles.
        self._clock: float | None = None
        self._unit, self._tokens, self._bytes = unit, 0, 0
        self._file = workdir / "metrics.jsonl"
        if enabled:
            rewind(self._file, step)
            self._board = Board(workdir / "tb", step + 1 if step else None)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Notes the metrics (host scalars) of one step. Raises AtomError when the file cannot be written."""
        if self._clock is None:
            self._bar.unpause()  # compiling is not in the time left either
            self.restart_clock()
        else:
            self._tokens += int(metrics["tokens"])
            self._bytes += int(metrics.get("bytes") or 0)
        self._bar.update()
        if step % self._every and step != self._steps:
            return
        values = {k: float(v) for k, v in metrics.items() if k not in ("tokens", "bytes")}
        text = "bits_per_byte" in values
        line = f"loss {values['loss']:.4g}" + (f", {values['bits_per_byte']:.3f} bits/byte" if text else "")
        if self._tokens:
            seconds = max(time.monotonic() - self._clock, 1e-9)
            counts = {"bytes": self._bytes} if text else {}
            counts[self._unit[0]] = self._tokens / self._unit[1]
            rates = {name: count / seconds for name, count in counts.items()}
            line += "".join(f", {rate:,.0f} {name}/s" for name, rate in rates.items())
            values |= {f"{name}_per_second": rate for name, rate in rates.items()}
        self._bar.set_postfix_str(line, refresh=False)
        self.restart_clock()
        self._write(step, "train", values)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Notes a validation. Raises AtomError when the file cannot be written."""
        self._write(step, "validation", values)
        bits = f", {values['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in values else ""
        line = f"step {step}: validation loss {values['loss']:.4f}{bits}"
        others = [f"{k} {v:.4f}" for k, v in values.items() if k not in ("loss", "bits_per_byte")]
        self.say(", ".join([line, *others]))

    def sample(self, step: int, text: str) -> None:
        """Notes a sample of the model's writing."""
        if self._enabled:
            self._board.text(step, "sample", text)
        self.say(f"step {step}: {text!r}")

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._enabled:
            self._bar.write(line, file=sys.stderr)

    def restart_clock(self) -> None:
        """Leaves the time since the last line, and the tokens, out of the rates."""
        self._clock, self._tokens, self._bytes = time.monotonic(), 0, 0

    def close(self) -> None:
        """Closes the files."""
        self._bar.close()
        if self._enabled:
            self._board.close()

    def _write(self, step: int, kind: str, values: dict[str, float]) -> None:
        if not self._enabled:
            return
        # Strict JSON has no NaN: null is what readers understand.
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
            self._board.scalars(step, {f"{kind}/{k}": v for k, v in clean.items() if v is not None})
        except OSError as e:
            raise AtomError(
                f"{self._file.parent}: the metrics of step {step} cannot be written ({e.strerror})"
            ) from e


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what a kill or a failing disk made of others is left out. AtomError where the
    file cannot be read."""
    lines = []
    try:
        raw = read_regular(path) if path.exists() else b""
    except OSError as e:
        raise AtomError(f"{path}: cannot be read ({e.strerror})") from None
    for text in raw.splitlines():
        try:
            line = json.loads(text)
            if type(line["step"]) is int and isinstance(line["kind"], str):
                lines.append(line)
        except (ValueError, RecursionError, TypeError, KeyError):
            continue
    return lines


def rewind(path: pathlib.Path, step: int) -> None:
    """Removes the lines after `step`, all at once or not at all."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read(path) if line["step"] <= step]
        try:
            write_text(path, "".join(kept))
        except OSError as e:
            raise AtomError(f"{path} cannot be written ({e.strerror})") from e
