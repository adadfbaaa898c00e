"""How a benchmark is run from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app
from tqdm import tqdm

from atom_jax import terminal
from atom_jax.typing import AtomError
from benchmarks.worker import Refused


def run(name: str, main: Callable[[], int | None]) -> None:
    """Runs `main` once flags are known, and ends with the exit code that it returns (0 for None): 1 after bad input,
    and what a side refuses, in one sentence on stderr; 130 after Ctrl-C."""

    def checked(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise AtomError(f"unexpected argument {argv[1]!r}")
        try:
            return main()
        except Refused as e:
            raise AtomError(str(e)) from None

    app.run(lambda argv: sys.exit(terminal.run(f"benchmarks.{name}", lambda: checked(argv))))


def numbers(flag: str, texts: Sequence[str], what: str = "numbers", least: int = 1) -> tuple[int, ...]:
    """What a flag lists. Raises AtomError for an empty list, and for what is no number or less than `least`."""
    if not texts or not all(t.isdecimal() and int(t) >= least for t in texts):
        raise AtomError(f"--{flag}={','.join(texts)}: expected {what} of at least {least}")
    return tuple(map(int, texts))


def say(text: str) -> None:
    """To standard output, above any progress bar."""
    tqdm.write(text)
    sys.stdout.flush()
