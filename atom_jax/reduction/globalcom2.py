"""GlobalCom2 (Liu et al., 2025): a thumbnail of the image says how much each of its crops may keep."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, kept, rank
from atom_jax.typing import AtomError

# A share of tokens that is whole but for rounding counts as whole.
_ROUNDING = 1e-4

ATTENTION = True


@config.register
@dataclasses.dataclass(frozen=True)
class GlobalCom2:
    """Keeps a share of the tokens of each of rows x columns crops, which together are the grid.

    Shares: base * (1 + s - mean s), at most 1, with s = softmax over crops of the thumbnail's attention in them, over
    `temperature`. Within a crop the tokens stay that have the most attention in their own last layer and in the
    thumbnail (bilinear, enlarged to the grid), each with length one over the crop. Up to base of all tokens are left,
    a few slots unused, since every crop's number is rounded down. The official temperature, 10, makes shares equal:
    attention adds up to 1 at most.

    Without a thumbnail the attention in the grid itself, averaged over blocks of rows x columns, stands in for it.
    Crops of padded images, whose padding the official code cuts off, are not built; a thumbnail's own tokens are
    reduced as those of one crop.
    """

    name: ClassVar[str] = "globalcom2"
    base: float = 0.25
    temperature: float = 0.05
    rows: int = 2
    columns: int = 2

    def __post_init__(self):
        some = (1, 2**15)
        config.check(self, base=(0, 1), temperature=(1e-6, 1e6), rows=some, columns=some)


def tokens(cfg: GlobalCom2, p: int) -> int:
    """base of all, rounded down, but at least one."""
    return max(int(cfg.base * p + _ROUNDING * cfg.rows * cfg.columns), 1)


def leaving(cfg: GlobalCom2, m: int, grid: tuple[int, int]) -> GlobalCom2:
    """m as a share. Raises AtomError for fewer tokens than crops."""
    if m < cfg.rows * cfg.columns:
        raise AtomError(f"globalcom2: {m} tokens of {cfg.rows} x {cfg.columns} crops; each needs one")
    return dataclasses.replace(cfg, base=m / (grid[0] * grid[1]))


def flops(cfg: GlobalCom2, p: int, d: int, k: int) -> float:
    """Of the scores of attention in one layer: attention itself does not say who got how much."""
    return 2.0 * p * p * d


def reduce(cfg: GlobalCom2, seen: Seen) -> Reduction:
    """See `GlobalCom2`."""
    height, width = seen.places("globalcom2")
    if height % cfg.rows or width % cfg.columns:
        raise AtomError(f"globalcom2: {height} x {width} tokens don't divide into {cfg.rows} x {cfg.columns} crops")
    if cfg.base * height * width + _ROUNDING < cfg.rows * cfg.columns:
        raise AtomError(f"globalcom2: base {cfg.base:g} of {height} x {width} tokens leaves less than one of a crop")
    own_bcn = _crops(cfg, seen.received("globalcom2", -1), (height, width))
    thumbnail = _shrunk(cfg, own_bcn, (height, width)) if seen.thumbnail is None else seen.thumbnail
    keep_bcn = (
        rank(scores(cfg, own_bcn, thumbnail, (height, width))) < budgets(cfg, thumbnail, own_bcn.shape[2])[..., None]
    )
    return kept(_image(cfg, keep_bcn, (height, width)), tokens(cfg, height * width))


def scales(cfg: GlobalCom2, thumbnail_bhw: jax.Array) -> jax.Array:
    """f32 [b, crops]: the share of its tokens that each crop may keep."""
    _, height, width = thumbnail_bhw.shape
    row = jnp.minimum(jnp.arange(height) // max(height // cfg.rows, 1), cfg.rows - 1)
    column = jnp.minimum(jnp.arange(width) // max(width // cfg.columns, 1), cfg.columns - 1)
    rows, columns = (jax.nn.one_hot(at, n) for at, n in ((row, cfg.rows), (column, cfg.columns)))
    total_brc = jnp.einsum("bhw,hr,wc->brc", thumbnail_bhw.astype(jnp.float32), rows, columns)
    s_bc = jax.nn.softmax(total_brc.reshape(-1, cfg.rows * cfg.columns) / cfg.temperature, axis=-1)
    return jnp.minimum(cfg.base * (1 + s_bc - s_bc.mean(-1, keepdims=True)), 1.0)


def budgets(cfg: GlobalCom2, thumbnail_bhw: jax.Array, n: int) -> jax.Array:
    """i32 [b, crops]: how many of its n tokens each crop keeps."""
    return jnp.floor(scales(cfg, thumbnail_bhw) * n + _ROUNDING).astype(jnp.int32)


def scores(cfg: GlobalCom2, own_bcn: jax.Array, thumbnail_bhw: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """f32 [b, crops, n]: the worth of tokens within their crop, from their crop's attention and the thumbnail's."""
    large = jax.image.resize(thumbnail_bhw.astype(jnp.float32), (own_bcn.shape[0], *grid), "bilinear")
    return _unit(own_bcn) + _unit(_crops(cfg, large.reshape(-1, grid[0] * grid[1]), grid))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _shrunk(cfg: GlobalCom2, own_bcn: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Means of attention [b, height, width] over blocks of rows x columns."""
    height, width = grid[0] // cfg.rows, grid[1] // cfg.columns
    return _image(cfg, own_bcn, grid).reshape(-1, height, cfg.rows, width, cfg.columns).mean((2, 4))


def _crops(cfg: GlobalCom2, x_bp: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[b, crops, n] of [b, p] in the image's order."""
    parts = x_bp.reshape(-1, cfg.rows, grid[0] // cfg.rows, cfg.columns, grid[1] // cfg.columns)
    return parts.transpose(0, 1, 3, 2, 4).reshape(x_bp.shape[0], cfg.rows * cfg.columns, -1)


def _image(cfg: GlobalCom2, x_bcn: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `_crops`."""
    parts = x_bcn.reshape(-1, cfg.rows, cfg.columns, grid[0] // cfg.rows, grid[1] // cfg.columns)
    return parts.transpose(0, 1, 3, 2, 4).reshape(x_bcn.shape[0], -1)
