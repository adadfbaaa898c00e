"""Average pooling over a coarser grid."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, merged
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Pool:
    """Averages the cells of a coarser grid of height x width: TokenFLEX's adaptive pooling, from its abstract,
    without the projector that it trains.

    Where the sizes don't divide each other, every token is in the one cell in which its upper left corner lies;
    adaptive pooling as usual would count some in two.
    """

    name: ClassVar[str] = "pool"
    height: int = 4
    width: int = 4

    def __post_init__(self):
        config.check(self, height=(1, 2**15), width=(1, 2**15))


def tokens(cfg: Pool, p: int) -> int:
    """height x width."""
    return cfg.height * cfg.width


def leaving(cfg: Pool, m: int, grid: tuple[int, int]) -> Pool:
    """The grid of m cells whose cells are closest to squares. Raises AtomError where there is none."""
    found = [(h, m // h) for h in range(1, grid[0] + 1) if m % h == 0 and m // h <= grid[1]]
    if not found:
        raise AtomError(f"pool: {m} is no product of a height and a width within {grid[0]} x {grid[1]}")
    height, width = min(found, key=lambda size: abs(np.log(grid[0] * size[1] / (grid[1] * size[0]))))
    return dataclasses.replace(cfg, height=height, width=width)


def flops(cfg: Pool, p: int, d: int, k: int) -> float:
    """None."""
    return 0.0


def reduce(cfg: Pool, seen: Seen) -> Reduction:
    """See `Pool`. The token in the middle of a cell lends its position."""
    (height, width), b = seen.places("pool"), seen.x.shape[0]
    if cfg.height > height or cfg.width > width:
        raise AtomError(f"pool: {cfg.height} x {cfg.width} cells of {height} x {width} tokens")
    row, middle_row = _cells(height, cfg.height)
    column, middle_column = _cells(width, cfg.width)
    slot = (row[:, None] * cfg.width + column).reshape(1, -1)
    lends = (middle_row[:, None] & middle_column).reshape(1, -1)
    shape = (b, height * width)
    return merged(jnp.broadcast_to(slot, shape), jnp.broadcast_to(lends, shape), cfg.height * cfg.width)


def _cells(n: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell i32 [n] of every place along one side, and bool [n]: the one in its middle."""
    cell = np.arange(n, dtype=np.int32) * cells // n
    first, count = np.searchsorted(cell, np.arange(cells)), np.bincount(cell)
    return cell, np.isin(np.arange(n), first + (count - 1) // 2)
