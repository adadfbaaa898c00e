"""Every k-th token takes in those between (the baseline of Bolya et al., 2023)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, joined
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Kth:
    """Merges every token into the one most like it among the last of every k.

    The official code drops what is left after the last whole k; here that is merged too.
    """

    name: ClassVar[str] = "kth"
    k: int = 2

    def __post_init__(self):
        config.check(self, k=(1, 2**31 - 1))


def tokens(cfg: Kth, p: int) -> int:
    """Whole groups of k, at least one."""
    return max(p // cfg.k, 1)


def leaving(cfg: Kth, m: int, grid: tuple[int, int]) -> Kth:
    """Raises AtomError where m does not divide the tokens."""
    p = grid[0] * grid[1]
    if p % m:
        raise AtomError(f"kth: {m} does not divide {p} tokens")
    return dataclasses.replace(cfg, k=p // m)


def flops(cfg: Kth, p: int, d: int, k: int) -> float:
    """Of the likenesses of all tokens and those that stay."""
    return 2.0 * p * tokens(cfg, p) * k


def reduce(cfg: Kth, seen: Seen) -> Reduction:
    """See `Kth`."""
    p = seen.x.shape[1]
    m = tokens(cfg, p)
    k = min(cfg.k, p)
    index = jnp.arange(p)[None]
    keep = jnp.broadcast_to((index % k == k - 1) & (index < m * k), seen.x.shape[:2])
    return joined(keep, seen.metric, m)
