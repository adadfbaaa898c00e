"""What the forward and the backward kernel share: how a tile of scores is masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.evict_attention.plan import Plan
from pallas_kernels.evict_attention.ref import NEGATIVE
from pallas_kernels.evict_attention.tuning import Blocks

LANES = 128
LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed when a kernel is traced. s: keys before padding."""

    s: int
    window: int | None
    keep_window: int
    segments: bool
    keep: bool
    blocks: Blocks
    triton: bool = False
    interpret: Any = False


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: where its first query and key stand (traced scalars)."""

    q: jax.Array
    k: jax.Array
    form: Form

    def kinds(self, plan: Plan, b: jax.Array, row: jax.Array, q_tile: jax.Array, k_tile: jax.Array) -> tuple:
        """Whether the tile is (free of masks and penalties, free of masks with every key penalised, mixed); none of
        them where every key was evicted. `plan` holds refs; b and row index its [b] and [b * h] arrays."""
        blocks = self.form.blocks
        whole = (plan.whole[b, q_tile] <= k_tile) & (k_tile < plan.whole_end[b, q_tile])
        if not self.form.keep:
            return whole, None, ~whole
        last = jnp.minimum(self.k + blocks.k_tile, self.form.s) - 1
        far = self.q - last > self.form.keep_window
        near = self.q + (blocks.q_tile - 1) - self.k <= self.form.keep_window
        gone = far & (plan.gone[row, k_tile] == 1)
        return whole & near, whole & far & ~gone, ~gone & ~(whole & (near | far))

    def penalty(self, shape: tuple[int, int], q_axis: int, segments: tuple | None, keep: jax.Array | None) -> tuple:
        """What is added to the scores, float32 of `shape`, and where queries are beyond the keep window.

        segments: those of queries and keys, `keep`: penalties of keys, all broadcast to `shape`."""
        form = self.form
        k_index = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
        distance = (self.q - self.k) + jax.lax.broadcasted_iota(jnp.int32, shape, q_axis) - k_index
        seen = distance >= 0
        if form.s % form.blocks.k_block:
            seen &= k_index < form.s - self.k
        if form.window is not None:
            seen &= distance < form.window
        if segments is not None:
            seen &= segments[0] == segments[1]
        if keep is None:
            return jnp.where(seen, 0.0, NEGATIVE), None
        far = distance > form.keep_window
        return jnp.where(seen, jnp.where(far, keep, 0.0), NEGATIVE), far


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over one axis of each, summed in float32 (and multiplied in it, where they are)."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def wide(x_lanes: jax.Array, n: int) -> jax.Array:
    """[rows, n] from [rows, LANES] whose lanes are equal."""
    return jnp.tile(x_lanes, (1, -(-n // LANES)))[:, :n]


def column(row: jax.Array) -> jax.Array:
    """[n, LANES] with equal lanes from [1, n]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def tile_at(i: jax.Array, size: int) -> Any:
    """Tile i of an axis of a ref."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def loop(low: Any, high: Any, body: Callable[[jax.Array], None]) -> None:
    """body(i) for i in [low, high)."""
    jax.lax.fori_loop(low, high, lambda i, _: body(i), None)


def at_once(g: int) -> int:
    """How many of g heads to work on in one go, so that products of one overlap with exponentials of another."""
    return next(n for n in (4, 3, 2, 1) if g % n == 0)
