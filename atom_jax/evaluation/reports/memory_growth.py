"""The picture of a lasting memory: what it holds over what it has read, next to a memory that keeps everything."""

from __future__ import annotations

import os

import numpy as np

from atom_jax import picture
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.lasting.memory import Memory

# Points of a line, at least; the law is known at every end of a block.
_POINTS = 512


def lines(law: Law, written: int) -> tuple[np.ndarray, np.ndarray]:
    """i64 [n] tokens that have left the window, from 0 to `written`, and entries per head that the law allows then,
    those that wait for their block included; at ends of blocks, where there are that many."""
    step = max(law.block, written // _POINTS // law.block * law.block)
    tokens = np.unique(np.append(np.arange(0, written, step), written))
    return tokens, np.array([law.held(int(n)) for n in tokens])


def draw(memory: Memory, path: str | os.PathLike) -> None:
    """Writes a PNG: entries per head over tokens by the law, what is held now, and the line of a memory that
    keeps every token. Raises AtomError when the file cannot be written."""
    picture.check(path)
    law, stats = memory.settings.law, memory.stats()
    tokens, held = lines(law, stats["written"])
    with picture.drawn(path, figsize=(7.0, 4.5)) as (_, ax):
        ax.plot(tokens, tokens, color="#999999", linestyle="--", label="every token")
        ax.plot(tokens, held, color="#0072B2", label=f"by the law {law}")
        now = f"held now: {stats['held']:,} of {stats['written']:,}"
        ax.plot([stats["written"]], [stats["held"]], "o", color="#D55E00", label=now)
        what = "units" if stats["units"] else "tokens"
        ax.set(xlabel=f"{what} that have left the window", ylabel="entries per key/value head", xlim=(0, None))
        ax.set_yscale("symlog", linthresh=max(law.block, 1))
        ax.set_ylim(0, None)
        ax.grid(alpha=0.25)
        ax.legend(loc="lower right", fontsize=9)
