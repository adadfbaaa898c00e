"""How many entries a lasting memory holds of what it has read: blocks of levels, each level twice as long as the one
below it and keeping less of every token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from atom_jax import config
from atom_jax.typing import AtomError

# Exponents by the names that a law may have.
GROWTH = {"log": 0.0, "sqrt": 0.5, "all": 1.0}
# Blocks that stand at a level between two writes.
MOST = 2
# Points of a law's line, at least; it is known at every end of a block.
_POINTS = 512


@dataclasses.dataclass(frozen=True)
class Law:
    """What is kept: a block of level i covers 2^i blocks of text and holds `keep(i)` entries per head.

    alpha: 0: entries grow like the logarithm of the tokens, 1/2: like their square root, 1: with them. entries: what
    a block of level 0 holds at most. block: tokens of one.
    """

    alpha: float = 0.5
    entries: int = 64
    block: int = 128

    def __post_init__(self):
        config.check(self, alpha=(0, 1), entries=(1, 2**20), block=(1, 2**20))
        if self.entries > self.block:
            raise AtomError(f"law: a block of {self.block} tokens can't hold {self.entries} entries")

    @classmethod
    def parse(cls, text: str) -> Law:
        """The law of a text such as "sqrt", "log:entries=32", "all:block=64" or "power:alpha=0.25"."""
        name, _, rest = text.strip().partition(":")
        fields = [f for f in rest.split(",") if f]
        if name not in (*GROWTH, "power"):
            raise AtomError(f"law {name!r}: expected {', '.join(GROWTH)} or power")
        named = {f.partition("=")[0].strip() for f in fields}
        if (name == "power") != ("alpha" in named):
            raise AtomError("law: alpha belongs to power, and power needs it")
        if name == "all" and "entries" in named:
            raise AtomError("law: all keeps whole blocks; entries are their tokens")
        law = config.build(cls, [*fields, "entries=1"] if name == "all" else fields, "law:")
        if name == "power":
            return law
        return dataclasses.replace(law, alpha=GROWTH[name], entries=law.block if name == "all" else law.entries)

    def keep(self, level: int) -> int:
        """Entries per head of a block of this level, at most."""
        return min(self.block << level, math.ceil(self.entries * 2 ** (self.alpha * level)))

    def held(self, tokens: int) -> int:
        """Entries per head after so many tokens, those that wait for their block included."""
        whole, rest = divmod(tokens, self.block)
        return rest + sum(map(self.keep, levels(whole)))

    def horizon(self, rank: float) -> float:
        """The age in tokens to which about a token stays of which a share `rank` of its block ranks higher: as long
        as its level keeps such a share."""
        if self.alpha == 1:
            return math.inf
        power = math.log(self.entries / (self.block * rank)) / (1 - self.alpha)
        return MOST * self.block * math.exp(power) if power < 600 else math.inf

    def __str__(self) -> str:
        name = next((name for name, alpha in GROWTH.items() if alpha == self.alpha), "")
        if name == "all" and self.entries == self.block:
            return f"all:block={self.block}"
        name = f"power:alpha={self.alpha}" if name in ("", "all") else name
        return f"{name}{',' if ':' in name else ':'}entries={self.entries},block={self.block}"


def levels(n: int) -> list[int]:
    """Levels of the blocks that stand after n blocks of text, the oldest (and highest) first."""
    out: list[int] = []
    level = 0
    while n > 0:
        merged = (n - 1) // MOST
        out = [level] * (n - MOST * merged) + out
        n, level = merged, level + 1
    return out


def merge(levels: list[int]) -> int | None:
    """The first of two neighbours that are to be merged into one of the next level: the two oldest of a level that
    has more than MOST blocks. None where there is no such level."""
    for level in sorted(set(levels)):
        if levels.count(level) > MOST:
            return levels.index(level)
    return None


def lines(law: Law, written: int) -> tuple[np.ndarray, np.ndarray]:
    """i64 [n] tokens that have left the window, from 0 to `written`, and entries per head that the law allows then,
    those that wait for their block included; at ends of blocks, where there are that many."""
    step = max(law.block, written // _POINTS // law.block * law.block)
    tokens = np.unique(np.append(np.arange(0, written, step), written))
    return tokens, np.array([law.held(int(n)) for n in tokens])
