"""How the kernels of `ssd_chunk` see its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.dispatch import pad_axis, round_up
from pallas_kernels.ssd_chunk.ref import Parts, decay, padded

BLOCK = 128
# Lanes of heads that a step handles at most.
WIDTH = 1024


class Form(NamedTuple):
    """Heads along lanes: h heads of k features with states of k x n; `size` lanes hold one, a step handles `heads`,
    and `groups` steps all of them."""

    h: int
    k: int
    n: int
    size: int
    heads: int
    groups: int

    @classmethod
    def of(cls, parts: Parts) -> Form:
        """Sizes that divide or fill tiles of 128 lanes, and whole tiles of heads."""
        h, k = parts[0].shape[2:]
        size = round_up(k, 128) if k > 128 else 1 << (k - 1).bit_length()
        per_tile = max(1, 128 // size)
        every = round_up(h, per_tile)
        heads = next(i for i in range(every, 0, -per_tile) if every % i == 0 and (i * size <= WIDTH or i == per_tile))
        return cls(h, k, parts[3].shape[2], size, heads, every // heads)

    @property
    def tile(self) -> int:
        return max(self.size, 128)

    @property
    def per_tile(self) -> int:
        return self.tile // self.size

    @property
    def width(self) -> int:
        return self.heads * self.size

    def tiles(self) -> Iterator[tuple[int, slice]]:
        """The first head and the lanes of every tile of a step."""
        for first in range(0, self.heads, self.per_tile):
            yield first, slice(first * self.size, first * self.size + self.tile)

    def lane_head(self, rows: int = BLOCK) -> jax.Array:
        """i32 [rows, tile]: the head of a lane, counted within its tile."""
        return jax.lax.broadcasted_iota(jnp.int32, (rows, self.tile), 1) // self.size

    def spread(self, columns: jax.Array, first: int) -> jax.Array:
        """Columns first, first + 1, ..., each over the lanes of its head: [rows, tile]."""
        lane_head = self.lane_head(columns.shape[0])
        out = jnp.broadcast_to(columns[:, first : first + 1], lane_head.shape)
        for n in range(1, self.per_tile):
            out = jnp.where(lane_head == n, columns[:, first + n : first + n + 1], out)
        return out

    def in_lanes(self, a: jax.Array) -> jax.Array:
        """[b, t, h, k] as [b, t, lanes]."""
        a = pad_axis(pad_axis(a, 3, self.size), 2, self.heads * self.groups)
        return a.reshape(*a.shape[:2], self.width * self.groups)

    def from_lanes(self, a: jax.Array) -> jax.Array:
        """The inverse of `in_lanes`."""
        return a.reshape(*a.shape[:2], self.heads * self.groups, self.size)[:, :, : self.h, : self.k]

    def state(self, s_bhkn: jax.Array) -> jax.Array:
        """f32 [b, n up to whole tiles, lanes]."""
        return pad_axis(self.in_lanes(s_bhkn.transpose(0, 3, 1, 2)), 1, 128)

    def from_state(self, s: jax.Array) -> jax.Array:
        """The inverse of `state`."""
        return self.from_lanes(s[:, : self.n]).transpose(0, 2, 3, 1)


class Blocks(NamedTuple):
    """Arguments in whole blocks. Per head f32 [b, long, h]: time steps, and sums of log decays within the block."""

    columns: jax.Array  # f32 [b, groups, long, 5 heads], as `kernel.split` names them.
    rows: jax.Array  # f32 [b, groups, heads, long], the sums.
    document: jax.Array  # i32 [b, 1, long].
    x: jax.Array
    b: jax.Array
    c: jax.Array
    dt: jax.Array

    @classmethod
    def of(cls, parts: Parts, form: Form) -> Blocks:
        x, dt, log, b, c, document = padded(parts, BLOCK)
        bs, long = document.shape
        by_block = document.reshape(bs, long // BLOCK, BLOCK)
        total = jnp.cumsum(log.reshape(*by_block.shape, form.h), axis=2)
        before = jnp.pad(by_block[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        since = decay(total, (by_block == before)[..., None])
        until = decay(total[:, :, -1:] - total, (by_block == by_block[:, :, -1:])[..., None])
        until, since, total = (a.reshape(dt.shape) for a in (until, since, total))
        columns = jnp.stack([dt, dt * until, until, since, total], axis=2)
        columns = pad_axis(columns, 3, form.heads * form.groups).reshape(bs, long, 5, form.groups, form.heads)
        columns = columns.transpose(0, 3, 1, 2, 4).reshape(bs, form.groups, long, 5 * form.heads)
        rows = columns[..., 4 * form.heads :].swapaxes(2, 3)
        b, c = (pad_axis(a, 2, 128) for a in (b, c))
        return cls(columns, rows, document[:, None], form.in_lanes(x), b, c, dt)

    @property
    def count(self) -> int:
        return self.document.shape[2] // BLOCK

    def inputs(self) -> tuple[jax.Array, ...]:
        """What every kernel reads, in the order of `Specs.inputs`."""
        return self[:6]


class Specs(NamedTuple):
    """Which part of every array belongs to a step (row of the batch, group of heads, block)."""

    inputs: list[pl.BlockSpec]
    positions: pl.BlockSpec
    state: pl.BlockSpec
    # A state, and a row of its lanes, per block; [n] per position and group; [heads] per position, along lanes.
    states: pl.BlockSpec
    ends: pl.BlockSpec
    shared: pl.BlockSpec
    rows: pl.BlockSpec

    @classmethod
    def of(cls, form: Form, blocks: int, reverse: bool = False) -> Specs:
        def at(j: jax.Array) -> jax.Array:
            return blocks - 1 - j if reverse else j

        n = round_up(form.n, 128)
        rows = pl.BlockSpec((None, None, form.heads, BLOCK), lambda i, g, j: (i, g, 0, at(j)))
        positions = pl.BlockSpec((None, BLOCK, form.width), lambda i, g, j: (i, at(j), g))
        shared = pl.BlockSpec((None, BLOCK, n), lambda i, g, j: (i, at(j), 0))
        inputs = [
            pl.BlockSpec((None, None, BLOCK, 5 * form.heads), lambda i, g, j: (i, g, at(j), 0)), rows,
            pl.BlockSpec((None, 1, BLOCK), lambda i, g, j: (i, 0, at(j))), positions, shared, shared,
        ]  # fmt: skip
        return cls(
            inputs, positions,
            state=pl.BlockSpec((None, n, form.width), lambda i, g, j: (i, 0, g)),
            states=pl.BlockSpec((None, None, n, form.width), lambda i, g, j: (i, at(j), 0, g)),
            ends=pl.BlockSpec((None, None, 1, form.width), lambda i, g, j: (i, at(j), 0, g)),
            shared=pl.BlockSpec((None, None, BLOCK, n), lambda i, g, j: (i, g, at(j), 0)),
            rows=rows,
        )  # fmt: skip
