"""Both sides of the benchmark in their own processes: the same work, checked once, then timed in turns."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from atom_jax.typing import AtomError
from benchmarks.worker import Worker

# Seconds between the sides, in which the threads of the one that just ran fall asleep.
PAUSE = 0.2
# Relative difference of logits or losses that the order of float32 sums explains.
CLOSE = 1e-3
OURS, PEER = "benchmarks.ours", "benchmarks.peers"
Rows = list[list[int]]


def need_torch() -> None:
    """Raises AtomError where the peer's libraries are not installed."""
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise AtomError(f"{library} is not installed, and there is nothing to compare with: `make install-torch`")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compare, and how often. prompts: lengths in tokens; train: configuration files with variants."""

    checkpoint: str = "models/smollm2-135m-instruct"
    prompts: tuple[int, ...] = (512, 2048)
    new_tokens: int = 64
    batch: int = 8
    train: tuple[str, ...] = ("configs/lm.py:quick", "configs/lm.py:base")
    train_steps: int = 4
    repeats: int = 5
    matmul: int = 4096
    megabytes: int = 1024


@dataclasses.dataclass(frozen=True)
class Figures:
    """Measured values of both sides, pair by pair, the peer's setting, and work per unit for the machine's share."""

    ours: list[float]
    peer: list[float]
    setting: str = ""
    # Which of the machine's rates bounds the row ("matmul", "read"), and how much of it one unit takes.
    bound: str = ""
    per_unit: float = 0.0


class Bench:
    """The two long-lived processes and what was prepared in them. Used as a context; leaving it ends them."""

    def __init__(self, plan: Plan, say: Callable[[str], None]):
        self.plan, self.say = plan, say
        self.directory = tempfile.TemporaryDirectory()
        self._prompts: dict[tuple[int, int], Rows] = {}
        self.model: dict[str, Any] | None = None
        # Peaks of memory in bytes, ours and the peer's, by training configuration.
        self.training_peaks: dict[str, list[int]] = {}

    def __enter__(self) -> Bench:
        self.ours, self.peer = Worker(OURS), Worker(PEER)
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.peer.close()
        self.directory.cleanup()

    def turns(self, ours: Callable[[], float], peer: Callable[[], float]) -> tuple[list[float], list[float]]:
        """Calls one after the other, `repeats` times; a side begins every second round."""
        figures: tuple[list[float], list[float]] = ([], [])
        for i in range(self.plan.repeats):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                self.say(f"{('ours', 'peer')[side]}, {i + 1} of {self.plan.repeats}")
                time.sleep(PAUSE)
                figures[side].append((ours, peer)[side]())
        return figures

    def fastest(self, peer: Worker, kind: str, seconds: Callable[[], float]) -> str:
        """Puts the peer into its fastest setting for this work, after one try of each; returns its name."""
        settings = peer("settings", kind)
        names = [_name(s, settings) for s in settings]
        peer("use", settings[0])
        if len(settings) == 1:
            return ""
        # First calls are slower.
        self.say("peer, first call")
        seconds()
        taken = []
        for setting, name in zip(settings, names):
            self.say(f"peer, trying {name}")
            peer("use", setting)
            taken.append(seconds())
        best = taken.index(min(taken))
        peer("use", settings[best])
        return names[best]

    def open(self) -> dict[str, Any]:
        """Loads the checkpoint on both sides, once, and compares their logits. Returns its configuration."""
        if self.model is None:
            self.say("loading")
            self.model = self.ours("open", self.plan.checkpoint)
            self.peer("open", self.plan.checkpoint)
            row = self.prompts(1, min(self.plan.prompts))[0][:128]
            file = str(pathlib.Path(self.directory.name) / "logits.npy")
            self.ours("logits", row, file)
            found = self.peer("difference", row, file)
            self.scale = found["largest"]
            if not found["difference"] <= CLOSE * self.scale:
                raise AtomError(
                    f"{self.plan.checkpoint}: logits of the two sides differ by {found['difference']:.3g} "
                    f"(largest: {self.scale:.3g}), so comparing their speed means nothing"
                )
        return self.model

    def prompts(self, rows: int, length: int) -> Rows:
        """The same prompts for both sides."""
        if (rows, length) not in self._prompts:
            self._prompts[rows, length] = self.ours("prompts", rows, length)
        return self._prompts[rows, length]

    def same_tokens(self, rows: Rows, ours: Rows, peer: Rows) -> None:
        """Raises AtomError where greedy tokens differ, except from a token on at which two were equally likely."""
        for row, a, b in zip(rows, ours, peer, strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            if at is None:
                continue
            margin = self.peer("margin", row + a[:at], a[at], b[at])
            if not margin <= CLOSE * self.scale:
                raise AtomError(
                    f"{self.plan.checkpoint}: after {len(row)} tokens of prompt and {at} new ones we choose {a[at]} "
                    f"and the peer {b[at]}, whose logits differ by {margin:.3g}: comparing their speed means nothing"
                )


def close(ours: list[float], peer: list[float], what: str) -> None:
    """Raises AtomError where losses differ by more than rounding explains."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, peer, strict=True))
    if not worst <= CLOSE:
        raise AtomError(f"{what}: losses {ours} and the peer's {peer} differ, so comparing their speed means nothing")


def rates(units: float, seconds: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """Units per second of both sides."""
    return [units / s for s in seconds[0]], [units / s for s in seconds[1]]


def spread(values: list[float]) -> float:
    """Half the range of values over their median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def _name(setting: dict[str, Any], settings: list[dict[str, Any]]) -> str:
    """The choices in which the settings differ."""
    varied = [k for k in setting if len({s[k] for s in settings}) > 1]
    return ", ".join(f"{setting[k]} threads" if k == "threads" else f"{setting[k]} {k}" for k in varied)
