"""The serving cache of Dynamic Memory Compression: a token takes a place of its own or that of the entry it joins.

Beside the entries there is what the next token may join: the mean that the newest entry is, in float32 (and before
RoPE), or the last span - 1 tokens, from which means over a span are made anew; and, with a window, the newest tokens,
which are no entries yet (`newest`). Any number of tokens may follow at any time; a prompt may be cut anywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache.dmc import decide
from atom_jax.kvcache.dmc.config import Settings
from atom_jax.kvcache.dmc.newest import Newest
from atom_jax.kvcache.dmc.pooling import Element, pooled
from atom_jax.kvcache.layer import Call, Sizes, stack_layers
from atom_jax.kvcache.paged import PagedLayer, attend_both
from atom_jax.kvcache.pool import NEVER, Pool, coarse
from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blockwise import one_softmax


@struct.dataclass
class DMCLayer(PagedLayer):
    """The memory of one layer. tail: r elements before the next token that merges or opens an entry. last: i32
    [b, h], flat index in the pool of the newest entry. newest: the tokens after it, or None without a window. policy:
    static."""

    pool: Pool
    tail: Element
    last: jax.Array
    newest: Any
    policy: Settings = struct.field(pytree_node=False)

    def extend(self, call: Call) -> tuple[jax.Array, DMCLayer]:
        """Reads new tokens; see `layer.Layer`."""
        cfg, tail, (b, h, t, _) = self.policy, self.tail, call.k.shape
        old, newest, near = call, None, None
        if cfg.window:
            old, newest, near = self.newest.extend(call, cfg)
        merges = decide.merges(old.said.leaves, old.tokens, cfg)
        new = tokens(merges, old.said.weights(merges), old, cfg)
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), tail, new)
        entries, r = pooled(every, cfg.span), tail.p.shape[2]
        own = jax.tree.map(lambda x: x[:, :, r:], entries)
        # Padding comes last: the elements up to the last token that is none.
        count = jnp.sum(call.real, axis=1, dtype=jnp.int32)
        at = jnp.broadcast_to((count[:, None] + jnp.arange(r)[None])[:, None], (b, h, r))
        tail = jax.tree.map(lambda x: _take(x, at), every if cfg.span else entries)
        seen_then = seen(own, old, cfg)
        out, pool, last = (self._one if t == 1 else self._many)(call, old, near, merges, *seen_then)
        return out.astype(call.q.dtype), self.replace(pool=pool, tail=tail, last=last, newest=newest)

    def _one(
        self, call: Call, old: Call, near: Any, merges: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, Pool, jax.Array]:
        """One token of every row: the output, the pool, and where the newest entry is. old: the token that merges or
        opens an entry, the same one or, with a window, the one that leaves it; near: see `attend_both`."""
        live = jnp.broadcast_to(old.real, self.last.shape)
        instead = jnp.where(merges[:, :, 0], self.last, -1)
        here = None if bias is None else bias[:, :, 0]
        pool, slot = self.pool.put(k[:, :, 0], v[:, :, 0], instead, live, here)
        last, q = jnp.where(live, slot, self.last), call.q[..., 0, :]
        if near is None and pool.by_kernel:
            return pool.attend_pages(q)[..., None, :], pool, last
        out, _, lse = pool.attend_one(q)
        out, lse = out[..., None, :], lse[..., None]
        return (out if near is None else one_softmax([(out, lse), near])), pool, last

    def _many(
        self, call: Call, old: Call, near: Any, merges: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, Pool, jax.Array]:
        """Several tokens of every row: attention to each other and to the pool, which is then laid out anew."""
        real, (b, h, t) = old.real, merges.shape
        # Queries stand where what merges at their time does.
        queries = Tokens(old.tokens.positions, call.real.astype(jnp.int32))
        keys = Tokens(old.tokens.positions, jnp.where(real, 1, -1))
        gone = jnp.concatenate([merges[:, :, 1:], jnp.zeros_like(merges[:, :, :1])], axis=2)
        keep, alive, until = jnp.where(gone, NEGATIVE, 0.0), real[:, None] & ~gone, None
        if not call.fresh:
            pages, page = self.k.shape[:2]
            joined = jnp.where(merges[:, :, 0], self.last, pages * page)
            until = jnp.full(pages * page, NEVER).at[joined].set(0, mode="drop").reshape(pages, page)
        out = attend_both(self.pool, call.q, k, v, queries, keep, 0, until, bias, keys, near)
        if call.fresh:
            pool, _, to = self.pool.rebuild(None, k, v, alive, bias)
            last = self.last
        else:
            pool, moved, to = self.pool.rebuild(self.pool.there & (until > 0), k, v, alive, bias)
            last = moved[self.last]
        # The last of them that is real, where any is.
        newest = jnp.max(jnp.where(real, jnp.arange(t)[None], 0), axis=1)[:, None, None]
        found = _take(to, jnp.broadcast_to(newest, (b, h, 1)))[..., 0]
        return out, pool, jnp.where(jnp.any(real, axis=1)[:, None], found, last)

    def held(self, length_b: jax.Array) -> jax.Array:
        """Entries of every head, and the newest tokens."""
        return self.pool.n + jnp.minimum(length_b, self.policy.window)[:, None]

    def copied(self, index_b: jax.Array, pages: int) -> DMCLayer:
        pool, last = self.pool.rows_of(index_b, self.last[index_b][..., None], pages)
        tail, newest = jax.tree.map(lambda x: x[index_b], (self.tail, self.newest))
        return self.replace(pool=pool, tail=tail, last=last[..., 0], newest=newest)

    def after(self, other: DMCLayer) -> DMCLayer:
        both = (self.tail, self.newest), (other.tail, other.newest)
        tail, newest = jax.tree.map(lambda *x: jnp.concatenate(x), *both)
        last = jnp.concatenate([self.last, other.last + self.k.shape[0] * self.k.shape[1]])
        return self.replace(pool=self.pool.joined(other.pool), tail=tail, last=last, newest=newest)


def tokens(p_bht: jax.Array, w_bht: jax.Array, call: Call, cfg: Settings) -> Element:
    """The elements of a call's tokens, which merge with probability p and have weights w."""
    k = call.k if cfg.turned else decide.lend(call.k_plain, cfg, _fade(call))
    return Element.tokens(p_bht, w_bht, k, call.v)


def seen(entries: Element, call: Call, cfg: Settings) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Entries [b, h, t] as attention sees them where a call's tokens stand: keys after RoPE and values [b, h, t, k],
    and the bias f32 [b, h, t] on their scores, or None."""
    k, v = entries.k.astype(call.k.dtype), entries.v.astype(call.v.dtype)
    channels = k.shape[3] if call.rotary is None else call.rotary
    if channels and not cfg.turned:
        cos, sin = (x[:, None, :, 0] for x in rope.tables(call.tokens.positions, channels, *call.rope))
        k = decide.lend(rope.rotate(k, cos, sin), cfg, _fade(call))
    return k, v, entries.e if cfg.mass else None


def _fade(call: Call) -> jax.Array | None:
    return None if call.mode is None else call.mode.fade


def _take(x: jax.Array, at_bht: jax.Array) -> jax.Array:
    """Entries of x [b, h, s] or [b, h, s, f] at i32 [b, h, t]."""
    return jnp.take_along_axis(x, at_bht if x.ndim == 3 else at_bht[..., None], axis=2)


def init(cfg: Settings, sizes: Sizes, capacity: int, n: int) -> DMCLayer:
    """Empty memories of n layers, stacked; see `policy.Policy.init`."""
    b, h = sizes.b, sizes.h
    pages = coarse(b * h * -(-capacity // cfg.page))
    layer = DMCLayer(
        Pool.empty(b, h, pages, cfg.page, sizes.k, sizes.dtype, cfg.mass),
        Element.nothing(b, h, max(1, cfg.span - 1), sizes.k),
        jnp.zeros((b, h), jnp.int32),
        Newest.empty(cfg, sizes) if cfg.window else None,
        cfg,
    )
    return stack_layers(layer, n)
