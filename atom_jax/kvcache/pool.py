"""Keys and values in pages that belong to rows, so that memory follows what every head retains.

A row r is one key/value head of one sequence (r = sequence * h + head); p counts pages, c entries of a page. An entry
is named by its flat index page * c + offset. Pages are handed out in order, and come back only where all rows are
laid out anew: for a prompt, or where rows have lost entries. The layout is vLLM's (Kwon et al., 2023) with one pool
for all heads instead of a table per sequence; the order of entries in a row means nothing, as keys carry RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.dense import bucket
from atom_jax.sharding import alone
from pallas_kernels.cache_attention.api import cache_attention, fits
from pallas_kernels.dispatch import NEGATIVE, choose

# Later than any position.
NEVER = np.int32(2**31 - 1)
# Rows up to which pages are added up by a product with a matrix of zeros and ones; beyond, its size is quadratic.
MATRIX_ROWS = 16


@struct.dataclass
class Pool:
    """Pages of one layer.

    k, v: [p, c, k]. owner: i32 [p], the page's row; b * h: free. filled: i32 [p], entries in it. n: i32 [b, h],
    entries of every row. tail: i32 [b, h], flat index of the next free entry of the row, -1 where it needs a page.
    used: i32 [], pages handed out. bias: f32 [p, c], added to the scores of the entries, or None. notes: what else is
    kept of every entry, a pytree of arrays [p, c], or None.
    """

    k: jax.Array
    v: jax.Array
    owner: jax.Array
    filled: jax.Array
    n: jax.Array
    tail: jax.Array
    used: jax.Array
    bias: Any = None
    notes: Any = None

    @classmethod
    def empty(cls, b: int, h: int, pages: int, page: int, k: int, dtype: Any, biased: bool = False) -> Pool:
        """Free pages."""
        return cls(
            *(jnp.zeros((pages, page, k), dtype) for _ in range(2)),
            jnp.full(pages, b * h, jnp.int32), jnp.zeros(pages, jnp.int32),
            jnp.zeros((b, h), jnp.int32), jnp.full((b, h), -1, jnp.int32), jnp.int32(0),
            jnp.zeros((pages, page), jnp.float32) if biased else None,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows that share the pages."""
        return self.n.shape[-2] * self.n.shape[-1]

    @property
    def row_of(self) -> jax.Array:
        """i32 [p]: `owner`, and any row for a free page."""
        return jnp.minimum(self.owner, self.rows - 1)

    @property
    def there(self) -> jax.Array:
        """bool [p, c]: entries that hold something."""
        return jnp.arange(self.k.shape[-2])[None] < self.filled[:, None]

    def put(
        self, k_bhk: jax.Array, v_bhk: jax.Array, instead: jax.Array, live: jax.Array, bias_bh: Any = None,
        notes_bh: Any = None,
    ) -> tuple[Pool, jax.Array]:  # fmt: skip
        """One new entry for every row with `live`, bool [b, h], and the flat indices of all, i32 [b, h].

        It takes the place of entry `instead`, i32 [b, h], where that is not negative, else the row's next free one.
        """
        pages, page, _ = self.k.shape
        rows = jnp.arange(self.rows)
        instead, live, tail = (x.reshape(-1) for x in (instead, live, self.tail))
        adds = live & (instead < 0)
        need = adds & (tail < 0)
        handed = jnp.cumsum(need, dtype=jnp.int32)
        new_page = self.used + handed - 1
        slot = jnp.where(instead >= 0, instead, jnp.where(tail < 0, new_page * page, tail))
        # Different places beyond the end, for the promise that no two are the same.
        nowhere = pages + rows
        at = jnp.where(live, slot // page, nowhere), slot % page

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            # One index per row: XLA then updates in place.
            new = new.reshape(-1, *old.shape[2:]).astype(old.dtype)
            return old.at[at].set(new, mode="drop", unique_indices=True)

        after = slot + 1
        shape = self.n.shape
        new = Pool(
            write(self.k, k_bhk),
            write(self.v, v_bhk),
            self.owner.at[jnp.where(need, new_page, nowhere)].set(rows, mode="drop", unique_indices=True),
            self.filled.at[jnp.where(adds, slot // page, nowhere)].add(1, mode="drop", unique_indices=True),
            self.n + adds.reshape(shape),
            jnp.where(adds, jnp.where(after % page == 0, -1, after), tail).reshape(shape),
            self.used + handed[-1],
            *jax.tree.map(write, (self.bias, self.notes), (bias_bh, notes_bh)),
        )
        return new, slot.reshape(shape)

    def attend_one(self, q_bhgk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of one query per row to all its entries, float32 [b, h, g, k], the scores, float32 [p, g, c], and
        their log-sum-exp, float32 [b, h, g].

        A softmax in every page, and one over the pages of a row: keys and values are read where they lie.
        """
        size = q_bhgk.shape[-1]
        q_pgk = q_bhgk.reshape(-1, *q_bhgk.shape[2:])[self.row_of]
        scores = jnp.einsum("pgk,pck->pgc", q_pgk, self.k, preferred_element_type=jnp.float32) * size**-0.5
        if self.bias is not None:
            scores += self.bias[:, None]
        masked = jnp.where(jnp.broadcast_to(self.there[:, None], scores.shape), scores, NEGATIVE)
        top = masked.max(-1)
        weights = jnp.exp(masked - top[..., None])
        out = jnp.einsum("pgc,pck->pgk", weights.astype(self.v.dtype), self.v, preferred_element_type=jnp.float32)
        highest = self._max(top)
        shrink = jnp.exp(top - highest[self.row_of])
        total = jnp.maximum(self._sum(shrink * weights.sum(-1)), 1e-30)
        out = self._sum(out * shrink[..., None]) / total[..., None]
        return out.reshape(q_bhgk.shape), scores, (highest + jnp.log(total)).reshape(q_bhgk.shape[:-1])

    def attend_pages(self, q_bhgk: jax.Array) -> jax.Array:
        """The outputs of `attend_one` by the kernel that reads only pages in use."""
        page = self.k.shape[-2]
        # A row's pages are full but for the last that it was handed.
        order = jnp.argsort(self.owner, stable=True).astype(jnp.int32)
        need = -(-self.n.reshape(-1) // page)
        first = (jnp.cumsum(need) - need).reshape(self.n.shape)
        return cache_attention(q_bhgk.astype(self.k.dtype), self.k, self.v, self.n, order, first)[0]

    @property
    def by_kernel(self) -> bool:
        """Whether `attend_pages` is to be used: on one TPU, for pages that its kernel can read."""
        return self.bias is None and choose(None) != "reference" and alone() and fits(self.k.shape[-2], self.k.dtype)

    def _mine(self) -> jax.Array:
        return self.owner[None] == jnp.arange(self.rows)[:, None]

    def _max(self, x_pg: jax.Array) -> jax.Array:
        """The largest of a row's pages, [r, g]."""
        if self.rows > MATRIX_ROWS:
            return jax.ops.segment_max(x_pg, self.owner, self.rows)
        shape = (self.rows, *x_pg.shape)
        mine = jnp.broadcast_to(self._mine()[..., None], shape)
        return jnp.max(jnp.where(mine, jnp.broadcast_to(x_pg[None], shape), NEGATIVE), axis=1)

    def _sum(self, x: jax.Array) -> jax.Array:
        """The sum over a row's pages, [p, ...] to [r, ...]."""
        if self.rows > MATRIX_ROWS:
            return jax.ops.segment_sum(x, self.owner, self.rows)
        return jnp.tensordot(self._mine().astype(x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)

    def attend_many(
        self, q_bhgtk: jax.Array, positions_bt: jax.Array, until_pc: jax.Array, since_pc: Any = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of t queries per row to the entries whose `until` is later than the query's position, and whose
        `since` (None: any) is not.

        Returns the sum of weights and the largest score, float32 [b, h, g, t], and the weighted sum of values,
        float32 [b, h, g, t, k]; weights are exp(score - largest). 0, NEGATIVE and 0 for a query that sees nothing.
        """
        b, h, g, t, _ = q_bhgtk.shape
        scores_of = self._scores_of(q_bhgtk, positions_bt, until_pc, since_pc)

        def visit(p: jax.Array, sums: tuple) -> tuple:
            row = self.owner[p]
            total, top, out = (x[row] for x in sums)
            scores, seen = scores_of(p)
            new_top = jnp.maximum(top, jnp.max(jnp.where(seen, scores, NEGATIVE), axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
            shrink = jnp.exp(top - new_top)
            new = jnp.einsum("nc,ck->nk", weights.astype(self.v.dtype), self.v[p], preferred_element_type=jnp.float32)
            here = total * shrink + weights.sum(-1), new_top, out * shrink[:, None] + new
            return tuple(x.at[row].set(y) for x, y in zip(sums, here))

        zero = jnp.zeros((b * h, g * t), jnp.float32)
        sums = (zero, zero + NEGATIVE, jnp.zeros((b * h, g * t, self.v.shape[-1]), jnp.float32))
        total, top, out = jax.lax.fori_loop(0, self.used, visit, sums)
        return total.reshape(b, h, g, t), top.reshape(b, h, g, t), out.reshape(q_bhgtk.shape)

    def received(
        self,
        q_bhgtk: jax.Array,
        positions_bt: jax.Array,
        until_pc: jax.Array,
        since_pc: jax.Array,
        lse_bhgt: jax.Array,
    ) -> jax.Array:
        """What entries receive of the attention of t queries per row at positions from `since` on and before `until`,
        all query heads together, float32 [p, c]. lse: the log-sum-exp of all that the queries see."""
        scores_of = self._scores_of(q_bhgtk, positions_bt, until_pc, since_pc)
        lse = lse_bhgt.reshape(self.rows, -1)

        def visit(p: jax.Array, got_pc: jax.Array) -> jax.Array:
            scores, seen = scores_of(p)
            weights = jnp.exp(jnp.where(seen, scores - lse[self.owner[p]][:, None], NEGATIVE))
            return got_pc.at[p].set(weights.sum(0))

        return jax.lax.fori_loop(0, self.used, visit, jnp.zeros(self.k.shape[:2], jnp.float32))

    def _scores_of(
        self, q_bhgtk: jax.Array, positions_bt: jax.Array, until_pc: jax.Array, since_pc: Any
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        """A function from a page in use to the scores of its row's queries, float32 [g t, c], and which they see."""
        b, h, g, t, size = q_bhgtk.shape
        q = q_bhgtk.reshape(b * h, g * t, size) * jnp.asarray(size**-0.5, q_bhgtk.dtype)
        positions = jnp.broadcast_to(positions_bt[:, None], (b, g, t)).reshape(b, g * t)
        there = self.there

        def scores_of(p: jax.Array) -> tuple[jax.Array, jax.Array]:
            row = self.owner[p]
            scores = jnp.einsum("nk,ck->nc", q[row], self.k[p], preferred_element_type=jnp.float32)
            scores = scores if self.bias is None else scores + self.bias[p][None]
            at = positions[row // h][:, None]
            seen = there[p][None] & (at < until_pc[p][None])
            return scores, seen if since_pc is None else seen & (at >= since_pc[p][None])

        return scores_of

    def rebuild(
        self, alive_pc: jax.Array | None, k_bhtk: jax.Array, v_bhtk: jax.Array, alive_bht: jax.Array,
        bias_bht: Any = None, notes_bht: Any = None,
    ) -> tuple[Pool, jax.Array | None, jax.Array]:  # fmt: skip
        """All rows laid out anew: the entries `alive_pc` (None: the pool is empty), then the tokens `alive_bht`.

        Returns the flat indices of old entries, i32 [p * c], and of tokens, i32 [b, h, t], too (those of the others
        lie beyond the end). The pages must suffice; what does not fit is lost.
        """
        pages, page, _ = self.k.shape
        b, h, t, _ = k_bhtk.shape
        end = pages * page
        tokens = alive_bht.reshape(b * h, t).astype(jnp.int32)
        rank = jnp.cumsum(tokens, axis=1) - tokens
        before = jnp.zeros(b * h, jnp.int32)
        if alive_pc is not None:
            old = alive_pc.astype(jnp.int32)
            before, start = self._ranks(old.sum(1))
        n = before + tokens.sum(1)
        need = -(-n // page)
        last = jnp.cumsum(need)
        first = last - need
        to_tokens = jnp.where(tokens > 0, (first * page + before)[:, None] + rank, end)
        to, to_old = to_tokens.reshape(-1), None
        if alive_pc is not None:
            base = first[self.row_of] * page + start
            to_old = jnp.where(old > 0, base[:, None] + jnp.cumsum(old, axis=1) - old, end).reshape(-1)
            to = jnp.concatenate([to_old, to])
        # Numbers are scattered and vectors gathered: a CPU scatters vectors slowly.
        source = jnp.zeros(end, jnp.int32).at[to].set(jnp.arange(len(to), dtype=jnp.int32), mode="drop")

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            every = new.reshape(-1, *old.shape[2:]).astype(old.dtype)
            if alive_pc is not None:
                every = jnp.concatenate([old.reshape(-1, *old.shape[2:]), every])
            return every[source].reshape(old.shape)

        ids = jnp.arange(pages, dtype=jnp.int32)
        owner = jnp.searchsorted(last, ids, side="right").astype(jnp.int32)
        row = jnp.minimum(owner, b * h - 1)
        filled = jnp.where(owner < b * h, jnp.clip(n[row] - (ids - first[row]) * page, 0, page), 0)
        tail = jnp.where(n % page == 0, -1, first * page + n)
        new = Pool(
            move(self.k, k_bhtk), move(self.v, v_bhtk), owner, filled, n.reshape(b, h), tail.reshape(b, h), last[-1],
            *jax.tree.map(move, (self.bias, self.notes), (bias_bht, notes_bht)),
        )  # fmt: skip
        return new, to_old, to_tokens.reshape(b, h, t)

    def _ranks(self, count_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of every row the sum of its pages' counts, i32 [r]; of every page that of the row's pages before it."""
        order = jnp.argsort(self.owner, stable=True)
        of_row = jax.ops.segment_sum(count_p, self.owner, self.rows)
        passed = jnp.cumsum(of_row) - of_row
        ordered = count_p[order]
        ranks = jnp.cumsum(ordered) - ordered - passed[self.row_of[order]]
        return of_row, jnp.zeros_like(ranks).at[order].set(ranks, unique_indices=True)

    def rows_of(self, index_b: jax.Array, slot_bhr: jax.Array, pages: int) -> tuple[Pool, jax.Array]:
        """A pool of so many pages with copies of the rows `index_b` of the batch, i32 [n], and where the entries
        `slot_bhr` (flat indices, of the new rows) lie in it. The pages must suffice."""
        page, h = self.k.shape[-2], self.n.shape[-1]
        start, rank = self._places()
        n = self.n[index_b]
        source = (index_b[:, None] * h + jnp.arange(h)[None]).reshape(-1)
        need = -(-n.reshape(-1) // page)
        last = jnp.cumsum(need, dtype=jnp.int32)
        first = last - need
        ids = jnp.arange(pages, dtype=jnp.int32)
        owner = jnp.searchsorted(last, ids, side="right").astype(jnp.int32)
        row = jnp.minimum(owner, len(source) - 1)
        order = jnp.argsort(self.owner, stable=True).astype(jnp.int32)
        old = order[jnp.clip(start[source[row]] + ids - first[row], 0, len(order) - 1)]
        tail = jnp.where(n % page == 0, -1, (last * page).reshape(n.shape) - page + n % page)
        filled = jnp.where(owner < len(source), self.filled[old], 0)
        beside = jax.tree.map(lambda x: x[old], (self.bias, self.notes))
        new = Pool(self.k[old], self.v[old], owner, filled, n, tail, last[-1], *beside)
        return new, (first.reshape(n.shape)[..., None] + rank[slot_bhr // page]) * page + slot_bhr % page

    def joined(self, other: Pool) -> Pool:
        """The rows of both pools, the other's pages after this one's; they are to be laid out by `rows_of`."""
        rows, end = self.rows + other.rows, self.k.shape[0] * self.k.shape[1]
        tail = jnp.where(other.tail < 0, other.tail, other.tail + end)
        owner = jnp.where(self.owner < self.rows, self.owner, rows)
        pairs = (
            (self.k, other.k), (self.v, other.v), (owner, other.owner + self.rows), (self.filled, other.filled),
            (self.n, other.n), (self.tail, tail),
        )  # fmt: skip
        both = (self.bias, self.notes), (other.bias, other.notes)
        beside = jax.tree.map(lambda *x: jnp.concatenate(x), *both)
        return Pool(*map(jnp.concatenate, pairs), self.used + other.used, *beside)

    def _places(self) -> tuple[jax.Array, jax.Array]:
        """Of every row its first place, i32 [r], where pages are ordered by their rows; of every page its number
        within its row, i32 [p] (meaningless for a free one)."""
        need = -(-self.n.reshape(-1) // self.k.shape[-2])
        start = jnp.cumsum(need, dtype=jnp.int32) - need
        place = jnp.argsort(jnp.argsort(self.owner, stable=True)).astype(jnp.int32)
        return start, place - start[self.row_of]

    def resized(self, pages: int) -> Pool:
        """The same entries in that many pages, of one layer or of stacked ones."""

        def fit(x: jax.Array, axis: int, fill: int) -> jax.Array:
            if pages <= x.shape[axis]:
                return jax.lax.slice_in_dim(x, 0, pages, axis=axis)
            widths = [(0, pages - n if i == axis else 0) for i, n in enumerate(x.shape)]
            return jnp.pad(x, widths, constant_values=fill)

        if pages == self.k.shape[-3]:
            return self
        axis = self.owner.ndim - 1
        bias, notes = jax.tree.map(lambda x: fit(x, axis, 0), (self.bias, self.notes))
        return self.replace(
            k=fit(self.k, axis, 0), v=fit(self.v, axis, 0), owner=fit(self.owner, axis, self.rows),
            filled=fit(self.filled, axis, 0), bias=bias, notes=notes,
        )  # fmt: skip

    def pages_for(self, more: int) -> int:
        """Pages that hold `more` further tokens per row whatever is evicted, of stacked layers in the largest."""
        page = self.k.shape[-2]
        need = -(-(np.asarray(self.n).astype(np.int64) + more) // page)
        return int(need.sum((-2, -1)).max())


def fine(n: int) -> int:
    """The first of 8, 9, ..., 15, 16, 18, ..., 30, 32, 36, ... that is at least n: steps of an eighth or less."""
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return max(8, -(-n // step) * step)


def coarse(n: int) -> int:
    """The first of 16, 24, 32, 48, ... that is at least n: few sizes, so few compilations."""
    return bucket(n)
