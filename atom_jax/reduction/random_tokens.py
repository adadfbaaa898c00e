"""Random tokens stay: what any other reducer has to beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, joined, kept, rank


@config.register
@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Keeps m tokens drawn from the seed, the same in every row. merge: the others go to the one most like them of
    those that stay (the baseline of Bolya et al., 2023), else they are dropped."""

    name: ClassVar[str] = "random"
    m: int = 16
    seed: int = 0
    merge: bool = False

    def __post_init__(self):
        config.check(self, m=(1, 2**31 - 1), seed=(0, 2**31 - 1))


def tokens(cfg: RandomTokens, p: int) -> int:
    """m."""
    return cfg.m


def leaving(cfg: RandomTokens, m: int, grid: tuple[int, int]) -> RandomTokens:
    """Any m."""
    return dataclasses.replace(cfg, m=m)


def flops(cfg: RandomTokens, p: int, d: int, k: int) -> float:
    """Of the likenesses of all tokens and those that stay, where the others are merged."""
    return 2.0 * p * cfg.m * k if cfg.merge else 0.0


def reduce(cfg: RandomTokens, seen: Seen) -> Reduction:
    """See `RandomTokens`."""
    draw = jax.random.uniform(jax.random.key(cfg.seed), seen.x.shape[1:2])
    keep = jnp.broadcast_to((rank(draw) < cfg.m)[None], seen.x.shape[:2])
    return joined(keep, seen.metric, cfg.m) if cfg.merge else kept(keep, cfg.m)
