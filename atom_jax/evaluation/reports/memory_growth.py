"""The picture of a lasting memory: what it holds over what it has read, next to a memory that keeps everything."""

from __future__ import annotations

import os

from atom_jax import picture
from atom_jax.kvcache.lasting.levels import lines
from atom_jax.lasting.memory import Memory


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
