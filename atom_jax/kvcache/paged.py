"""What the serving caches of learned policies share: the entries of all heads lie in a pool of pages, so that the
memory is what is retained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.memory import Layer
from atom_jax.kvcache.pool import Pool, coarse, fine
from atom_jax.nn.attention import Tokens, block_size, with_bias
from atom_jax.nn.blockwise import blockwise_lse

# Tokens per row for which there is room after `grow` for a few tokens; for more at once, room is found coarsely.
AHEAD = 64


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

    def held(self, length_b: jax.Array) -> jax.Array:
        """Entries of every head."""
        return self.pool.n

    def rows(self, index_b: jax.Array, axis: int = 0, pages: int = 0) -> PagedLayer:
        """Copies of the rows' pages; pages nobody refers to are not there any more. pages: to keep, where so many
        suffice and are not far too many."""
        pool, index = self.pool, jnp.asarray(index_b)
        pages = _pages(pool.replace(n=jnp.take(pool.n, index, axis=axis)), 1, pages)
        of = functools.partial(type(self)._copied, pages=pages)
        return (jax.vmap(of, in_axes=(0, None)) if axis else of)(self, index)

    def put(self, index_b: np.ndarray, other: PagedLayer, axis: int = 0) -> PagedLayer:
        """All rows are laid out anew."""
        index, rows = np.asarray(index_b), self.pool.n.shape[axis]
        source, new = np.arange(rows), np.flatnonzero(index < rows)
        source[index[new]] = rows + new
        both = type(self)._after
        return (jax.vmap(both) if axis else both)(self, other).rows(source, axis, self.k.shape[-3])

    def _copied(self, index_b: jax.Array, pages: int) -> PagedLayer:
        """The rows `index_b` of one layer in so many pages."""
        raise NotImplementedError

    def _after(self, other: PagedLayer) -> PagedLayer:
        """The rows of one layer, and after them those of another."""
        raise NotImplementedError


def _pages(pool: Pool, more: int, have: int) -> int:
    """Pages for `more` further tokens per row: `have`, unless they are too few or, for single tokens, half as many
    again as need be. Closely spaced sizes for single tokens, few for a prompt, as every size is compiled for."""
    if have < pool.pages_for(more):
        return fine(pool.pages_for(AHEAD)) if more <= AHEAD else coarse(pool.pages_for(more))
    enough = fine(pool.pages_for(AHEAD))
    return enough if more <= AHEAD and 2 * have > 3 * enough else have


def attend_both(
    pool: Pool, q_bhgtk: jax.Array, k_bhtk: jax.Array, v_bhtk: jax.Array, tokens: Tokens, keep_bht: jax.Array,
    keep_window: int, until_pc: jax.Array, bias_bht: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attention [b, h, g, t, k] of new tokens to each other and to the pool, as one softmax. keep, keep_window: as in
    `attention.attend`; until: i32 [p, c], the first position that does not see an entry of the pool; bias: of the new
    tokens, as the pool has it."""
    places = (tokens.positions, tokens.segments) * 2
    new = (q_bhgtk, k_bhtk, v_bhtk) if bias_bht is None else with_bias(q_bhgtk, k_bhtk, v_bhtk, bias_bht)
    own, lse = blockwise_lse(*new, places, None, True, block_size(k_bhtk.shape[2]), keep_bht, keep_window)
    own = own[..., : k_bhtk.shape[3]]
    total, top, out = pool.attend_many(q_bhgtk, tokens.positions, until_pc)
    highest = jnp.maximum(lse, top)
    w_own, w_pool = jnp.exp(lse - highest), jnp.exp(top - highest)
    mixed = w_own[..., None] * own.astype(jnp.float32) + w_pool[..., None] * out
    return mixed / (w_own + w_pool * total)[..., None]
