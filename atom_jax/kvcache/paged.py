"""What the serving caches of learned policies share: the entries of all heads lie in a pool of pages, so that the
memory is what is retained."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import params
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.layer import Layer
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.pool import Pool, coarse, fine
from atom_jax.nn.attention import Tokens, block_size, with_bias
from atom_jax.nn.blockwise import blockwise_lse, one_softmax

# Tokens per row for which there is room after `grow` for a few tokens; for more at once, room is found coarsely.
AHEAD = 64
# Pages of the layer that needs most, in those that layers need on average, from which on they differ in size.
UNEVEN = 1.25


class PagedLayer(Layer):
    """The memory of one layer whose entries lie in `pool`."""

    pool: Pool

    @property
    def k(self) -> jax.Array:
        """Keys [p, c, k], by pages."""
        return self.pool.k

    @property
    def v(self) -> jax.Array:
        """Values [p, c, k], by pages."""
        return self.pool.v

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """Whether the next tokens of all rows might not fit."""
        page, tail = self.k.shape[1], self.pool.tail
        free = jnp.where(tail < 0, 0, page - tail % page)
        short = jnp.sum(-(-jnp.maximum(more - free, 0) // page)) > self.k.shape[0] - self.pool.used
        return jnp.broadcast_to(short, length_b.shape)

    def grow(self, length_b: np.ndarray, more: int) -> PagedLayer:
        """Room for `more` tokens per row, whatever is evicted.

        For single tokens (at most AHEAD) smaller where it is half as large again as it need be; for a prompt never.
        """
        have = self.k.shape[-3]
        pages = _pages(self.pool, more, have)
        return self if pages == have else self.replace(pool=self.pool.resized(pages))

    def trim(self) -> PagedLayer:
        """Pages for what is held and AHEAD tokens of every row."""
        return self.replace(pool=self.pool.resized(fine(self.pool.pages_for(AHEAD))))

    def row_bytes(self, tokens: int) -> int:
        """What does not lie in pages."""
        return params.nbytes(self) - self.k.shape[-3] * self._page_bytes

    def page_bytes(self, entries: Sequence[float], level: Level) -> int:
        """Bytes of the pages of rows of which heads keep so many entries on average; level: see `Cost.nbytes`."""
        page, heads = self.k.shape[-2], self.pool.n.shape[-1]
        pages = coarse(sum(heads * -(-(math.ceil(level.fullest * n) + AHEAD) // page) for n in entries))
        return int(self._page_bytes * pages * level.evenness)

    @property
    def _page_bytes(self) -> int:
        pool = self.pool
        paged = (pool.k, pool.v, pool.owner, pool.filled, pool.bias, pool.notes)
        return params.nbytes(paged) // self.k.shape[-3]

    def held(self, length_b: jax.Array) -> jax.Array:
        """Entries of every head."""
        return self.pool.n

    def rows(self, index_b: jax.Array, axis: int = 0) -> PagedLayer:
        """Copies of the rows' pages; pages nobody refers to are not there any more. As many pages for each row as
        now, where these are enough and not twice too many: a size that comes again."""
        index = np.asarray(index_b)
        need = self.pool.replace(n=np.take(np.asarray(self.pool.n), index, axis)).pages_for(AHEAD)
        pages = -(-self.k.shape[-3] * len(index) // self.pool.n.shape[axis])
        return _copied(self, None, index, axis=axis, pages=pages if need <= pages <= 2 * need else coarse(need))

    def put(self, index_b: np.ndarray, other: PagedLayer, axis: int = 0) -> PagedLayer:
        """All rows are laid out anew, in as many pages as before where these suffice."""
        index, rows = np.asarray(index_b), self.pool.n.shape[axis]
        source, new = np.arange(rows), np.flatnonzero(index < rows)
        source[index[new]] = rows + new
        n = np.take(np.concatenate([np.asarray(x.pool.n) for x in (self, other)], axis), source, axis)
        need, pages = self.pool.replace(n=n).pages_for(AHEAD), self.k.shape[-3]
        return _copied(self, other, source, axis=axis, pages=pages if need <= pages else coarse(need))

    def copied(self, index_b: jax.Array, pages: int) -> PagedLayer:
        """The rows `index_b` of one layer in so many pages."""
        raise NotImplementedError

    def after(self, other: PagedLayer) -> PagedLayer:
        """The rows of one layer, and after them those of another."""
        raise NotImplementedError


def in_pages(memory: Memory) -> list[PagedLayer]:
    """The layers whose entries lie in pages."""
    return [x for x in memory_lib.layers(memory) if isinstance(x, PagedLayer)]


@functools.partial(jax.jit, static_argnames=("axis", "pages"))
def _copied(layer: PagedLayer, other: PagedLayer | None, index: jax.Array, *, axis: int, pages: int) -> PagedLayer:
    """Rows of a layer, or of stacked ones (axis 1), and of those of `other` after them."""
    over = (lambda f: jax.vmap(f)) if axis else lambda f: f
    both = layer if other is None else over(lambda one, two: one.after(two))(layer, other)
    return over(lambda one: one.copied(index, pages))(both)


class Level:
    """Sizes of pools for rows that come and go, with room for AHEAD single tokens: of few numbers, so that what is
    compiled for them serves again.

    All layers have equally many pages; or, where they are apart and that takes less, as many in proportion as the
    first uneven ones were seen to need, in eighths of what the layer that keeps most has.
    fullest: how often as many entries as a layer has on average the one with most has, as was seen latest; evenness:
    pages of all layers, as a share of what they would be if all had as many as that one. Runs on the host.
    """

    def __init__(self) -> None:
        self.fullest, self.evenness = 1.0, 1.0
        self._shares: np.ndarray | None = None

    def __call__(self, memory: Memory) -> Memory:
        """The same memory in pools of such sizes."""
        pools: list[Pool] = []

        def seen(layer: Layer) -> Layer:
            pools.extend([layer.pool] if isinstance(layer, PagedLayer) else [])
            return layer

        memory_lib.map_layers(seen, memory)
        if not pools:
            return memory
        held = np.concatenate([np.asarray(pool.n).sum((-2, -1)).reshape(-1) for pool in pools])
        self.fullest = float(held.max() / held.mean()) if held.any() else 1.0
        pages = self._pages(np.array([pool.pages_for(AHEAD) for pool in pools]))
        self.evenness = float(pages.mean() / pages.max())
        left = iter(pages.tolist())

        def fit(layer: Layer) -> Layer:
            return layer.replace(pool=layer.pool.resized(next(left))) if isinstance(layer, PagedLayer) else layer

        return memory_lib.map_layers(fit, memory)

    def _pages(self, need: np.ndarray) -> np.ndarray:
        """Pages of each layer, of which so many are needed."""
        if self._shares is None and need.max() >= UNEVEN * need.mean():
            self._shares = np.ceil(8 * need / need.max()) / 8
        even = np.full(len(need), coarse(int(need.max())))
        if self._shares is None or len(self._shares) != len(need):
            return even
        uneven = np.ceil(coarse(int(np.ceil(need / self._shares).max())) * self._shares).astype(int)
        return uneven if uneven.sum() < even.sum() else even


def _pages(pool: Pool, more: int, have: int) -> int:
    """Pages for `more` further tokens per row: `have`, unless they are too few or, for single tokens, half as many
    again as need be. Closely spaced sizes for single tokens, few for a prompt, as every size is compiled for."""
    if have < pool.pages_for(more):
        return fine(pool.pages_for(AHEAD)) if more <= AHEAD else coarse(pool.pages_for(more))
    enough = fine(pool.pages_for(AHEAD))
    return enough if more <= AHEAD and 2 * have > 3 * enough else have


def attend_both(
    pool: Pool, q_bhgtk: jax.Array, k_bhtk: jax.Array, v_bhtk: jax.Array, tokens: Tokens, keep_bht: jax.Array,
    keep_window: int, until_pc: jax.Array | None, bias_bht: jax.Array | None = None, keys: Tokens | None = None,
    near: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:  # fmt: skip
    """Attention [b, h, g, t, k] of queries to new entries, of which key i stands where query i stands, and to the
    pool, as one softmax.

    tokens: where the queries stand; keys: the new entries, None: the same. keep, keep_window: as in
    `attention.attend`. until: i32 [p, c], the first position that does not see an entry of the pool; None: the pool
    is empty. bias: of the new entries, as the pool has it. near: outputs and log-sum-exps of the queries over keys
    that are in neither.
    """
    keys = tokens if keys is None else keys
    places = (tokens.positions, tokens.segments, keys.positions, keys.segments)
    new = (q_bhgtk, k_bhtk, v_bhtk) if bias_bht is None else with_bias(q_bhgtk, k_bhtk, v_bhtk, bias_bht)
    own, lse = blockwise_lse(
        *new, places, None, True, block_size(k_bhtk.shape[2], len(k_bhtk)), keep_bht, keep_window
    )
    parts = [(own[..., : k_bhtk.shape[3]], lse)] + ([] if near is None else [near])
    if until_pc is not None:
        total, top, out = pool.attend_many(q_bhgtk, tokens.positions, until_pc)
        total = jnp.maximum(total, 1e-30)
        parts.append((out / total[..., None], top + jnp.log(total)))
    return one_softmax(parts)
