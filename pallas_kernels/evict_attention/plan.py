"""Which tiles of a [queries, keys] square have to be computed, and which of them need no mask.

Tiles are far fewer than scores, so this is a little jnp before the kernel, which reads the result as scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.evict_attention.ref import NOTHING
from pallas_kernels.evict_attention.tuning import Blocks

LAST = jnp.iinfo(jnp.int32).max


class Plan(NamedTuple):
    """Scalars of a kernel, i32. Tiles of keys in [first, end) are seen by some query of a tile of queries, those in
    [whole, whole_end) by all its queries. Blocks of keys in [block_first, block_end) are seen by a block of queries,
    blocks of queries in [q_first, q_end) see a block of keys."""

    start: jax.Array  # [b]: where the first query stands
    first: jax.Array  # [b, tiles of queries]
    end: jax.Array
    whole: jax.Array
    whole_end: jax.Array
    block_first: jax.Array  # [b, blocks of queries]
    block_end: jax.Array
    q_first: jax.Array  # [b * h, blocks of keys]
    q_end: jax.Array
    gone: jax.Array  # [b * h, tiles of keys]: 1 where no key of a tile is kept beyond the keep window
    alive: jax.Array  # [b * h, blocks of keys]: the first block from here on of which something is kept


class _Rows:
    """An array [rows, n] that lies in a ref as one row: rows of their own are padded to 128 scalars there."""

    def __init__(self, ref: Any, n: int):
        self.ref, self.n = ref, n

    def __getitem__(self, at: tuple) -> jax.Array:
        return self.ref[at[0] * self.n + at[1]]


def flat(plan: Plan) -> list[jax.Array]:
    """The arrays of a plan, each as one row."""
    return [x.reshape(-1) for x in plan]


def unflat(refs: Sequence, widths: tuple[int, ...]) -> Plan:
    """A plan over refs of `flat`; widths: of the arrays' rows."""
    return Plan(refs[0], *(_Rows(ref, n) for ref, n in zip(refs[1:], widths[1:])))


def make(
    start_b: jax.Array,
    t: int,
    s: int,
    segments: tuple[jax.Array, jax.Array] | None,
    keep_bhs: jax.Array | None,
    h: int,
    window: int | None,
    keep_window: int,
    blocks: Blocks,
) -> Plan:
    """The plan for t queries and s keys (their lengths before padding); `segments` and `keep_bhs` are padded."""
    b = start_b.shape[0]
    low, high = (x[None, :, None] for x in _ends(t, blocks.q_block, blocks.q_tile))
    k_low, k_high = (x[None, None] for x in _ends(s, blocks.k_block, blocks.k_tile))
    q_low, q_high = (start_b[:, None, None] + x for x in (low, high))
    some = (q_high >= k_low) & (low < t) & (k_low < s)
    whole = (q_low >= k_low + blocks.k_tile - 1) & (k_low + blocks.k_tile <= s)
    if window is not None:
        some &= q_low - k_high < window
        whole &= q_high - k_low < window
    if segments is not None:
        q_min, q_max, q_one = (x[:, :, None] for x in _range(segments[0], blocks.q_tile))
        k_min, k_max, k_one = (x[:, None, :] for x in _range(segments[1], blocks.k_tile))
        some &= (q_max >= k_min) & (k_max >= q_min)
        whole &= q_one & k_one & (q_min == k_min)
    first, end = _span(some)
    whole_first, whole_end = _span(whole, run=True)
    per_q, per_k = blocks.q_block // blocks.q_tile, blocks.k_block // blocks.k_tile
    pairs = some.reshape(b, -1, per_q, some.shape[2] // per_k, per_k).any((2, 4))
    gone = jnp.zeros((b, h, k_low.size), bool)
    if keep_bhs is not None:
        gone = (keep_bhs.reshape(b, h, -1, blocks.k_tile) <= NOTHING).all(-1)
    gone_block = gone.reshape(b, h, -1, per_k).all(-1)
    q_first, q_end = _span(pairs.swapaxes(1, 2))
    # Queries from this block on are all beyond the keep window of the keys of a block.
    far = (k_high.reshape(1, -1, per_k)[..., -1] + keep_window - start_b[:, None]) // blocks.q_block + 1
    seen = jnp.where(gone_block, jnp.minimum(q_end, far)[:, None], q_end[:, None])
    n = gone_block.shape[2]
    index = jnp.where(gone_block, n, jnp.arange(n)[None, None])
    alive = jax.lax.cummin(index, axis=2, reverse=True)
    rows = [jnp.broadcast_to(q_first[:, None], seen.shape), seen, gone, alive]
    rows = [x.reshape(b * h, -1) for x in rows]
    plan = Plan(start_b, first, end, whole_first, whole_end, *_span(pairs), *rows)
    return jax.tree.map(lambda x: x.astype(jnp.int32), plan)


def _ends(n: int, block: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Index of the first and of the last entry of every tile, up to n - 1."""
    low = jnp.arange(-(-n // block) * (block // tile)) * tile
    return low, jnp.minimum(low + tile, n) - 1


def _range(segments: jax.Array, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Smallest and largest segment of every tile, and whether all of it is one segment; padding aside."""
    x = segments.reshape(segments.shape[0], -1, tile)
    low, high = jnp.where(x > 0, x, LAST).min(-1), x.max(-1)
    return low, high, (x.min(-1) == high) & (high > 0)


def _span(where: jax.Array, run: bool = False) -> tuple[jax.Array, jax.Array]:
    """First True along the last axis, and the place after the last one (after the first run of them); else 0, 0."""
    n = where.shape[-1]
    first = jnp.argmax(where, axis=-1)
    end = n - jnp.argmax(where[..., ::-1], axis=-1)
    if run:
        ends = ~where & (jax.lax.broadcasted_iota(jnp.int32, where.shape, where.ndim - 1) > first[..., None])
        end = jnp.where(ends.any(-1), jnp.argmax(ends, axis=-1), n)
    return first, jnp.where(where.any(-1), end, 0)
