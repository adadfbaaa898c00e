"""HiPrune: what a middle layer looks at with its surroundings, then what a deep one looks at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, kept, rank

ATTENTION = True


@config.register
@dataclasses.dataclass(frozen=True)
class HiPrune:
    """Keeps m tokens of a grid: the round(m alpha / 5) with the most attention in the object layer, their neighbours
    above, below, left and right, and then those with the most attention in the deep layer. Others are dropped.

    object_layer: None = 3/8 of the way through the layers (9 of 24). deep_layer: the last but one.
    wrap: neighbours as in the official code, by index: those at the left and right edge lie in another row, and above
        the first and below the last row they are the first and the last token.
    """

    name: ClassVar[str] = "hiprune"
    m: int = 16
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int = -2
    wrap: bool = False

    def __post_init__(self):
        config.check(self, m=(1, 2**31 - 1), alpha=(0, 1))


def tokens(cfg: HiPrune, p: int) -> int:
    """m."""
    return cfg.m


def leaving(cfg: HiPrune, m: int, grid: tuple[int, int]) -> HiPrune:
    """Any m."""
    return dataclasses.replace(cfg, m=m)


def flops(cfg: HiPrune, p: int, d: int, k: int) -> float:
    """Of the scores of attention in two layers: attention itself does not say who got how much."""
    return 4.0 * p * p * d


def reduce(cfg: HiPrune, seen: Seen) -> Reduction:
    """See `HiPrune`."""
    height, width = seen.places("hiprune")
    layers = 0 if seen.attention is None else seen.attention.shape[1]
    object_bp = seen.received("hiprune", layers * 3 // 8 if cfg.object_layer is None else cfg.object_layer)
    deep_bp = seen.received("hiprune", cfg.deep_layer)
    anchor = rank(object_bp) < round(cfg.m * cfg.alpha / 5)
    near = _by_index(anchor, width) if cfg.wrap else _around(anchor, height, width)
    # First the anchors, then what is around them, then the rest.
    level = 2.0 * anchor + (near & ~anchor)
    order = jnp.lexsort((-deep_bp, -level), axis=1)
    return kept(jnp.argsort(order, axis=1) < cfg.m, cfg.m)


def _around(chosen: jax.Array, height: int, width: int) -> jax.Array:
    """bool [b, p]: whether a token above, below, left or right in the grid is chosen."""
    cells = jnp.pad(chosen.reshape(-1, height, width), ((0, 0), (1, 1), (1, 1)))
    near = cells[:, :-2, 1:-1] | cells[:, 2:, 1:-1] | cells[:, 1:-1, :-2] | cells[:, 1:-1, 2:]
    return near.reshape(chosen.shape)


def _by_index(chosen: jax.Array, width: int) -> jax.Array:
    """The same with the neighbours of the official code."""
    b, p = chosen.shape
    index = jnp.arange(p)
    near = jnp.zeros((b, p), bool)
    for step in (-1, 1, -width, width):
        near = near.at[:, jnp.clip(index + step, 0, p - 1)].max(chosen)
    return near
