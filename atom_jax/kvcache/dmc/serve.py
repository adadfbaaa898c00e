"""The serving cache of Dynamic Memory Compression: a token takes a place of its own or that of the entry it joins.

Beside the entries there is what the next token may join: the mean that the newest entry is, in float32 (and before
RoPE), or the last span - 1 tokens, from which means over a span are made anew. Any number of tokens may follow at any
time; a prompt may be cut anywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache.dmc import decide
from atom_jax.kvcache.dmc.config import Settings
from atom_jax.kvcache.dmc.pooling import Element, pooled
from atom_jax.kvcache.memory import Call, Sizes, stack_layers
from atom_jax.kvcache.paged import PagedLayer, attend_both
from atom_jax.kvcache.pool import NEVER, Pool, coarse
from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens, attend


@struct.dataclass
class DMCLayer(PagedLayer):
    """The memory of one layer. tail: r elements before the next token. last: i32 [b, h], flat index in the pool of
    the newest entry. policy: static."""

    pool: Pool
    tail: Element
    last: jax.Array
    policy: Settings = struct.field(pytree_node=False)

    def extend(self, call: Call) -> tuple[jax.Array, DMCLayer]:
        """Reads new tokens; see `memory.Layer`."""
        cfg, tail, (b, h, t, _) = self.policy, self.tail, call.k.shape
        merges = decide.merges(call.said.z, call.tokens, cfg)
        new = tokens(merges, call, cfg)
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), tail, new)
        entries, r = pooled(every, cfg.span), tail.p.shape[2]
        own = jax.tree.map(lambda x: x[:, :, r:], entries)
        # Padding comes last: the elements up to the last token that is none.
        count = jnp.sum(call.real, axis=1, dtype=jnp.int32)
        at = jnp.broadcast_to((count[:, None] + jnp.arange(r)[None])[:, None], (b, h, r))
        tail = jax.tree.map(lambda x: _take(x, at), every if cfg.span else entries)
        seen_now = seen(own, call, cfg)
        out, pool, last = (self._one if t == 1 else self._many)(call, merges, *seen_now)
        return out.astype(call.q.dtype), self.replace(pool=pool, tail=tail, last=last)

    def _one(
        self, call: Call, merges: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, Pool, jax.Array]:
        """One token of every row: the output, the pool, and where the newest entry is."""
        live = jnp.broadcast_to(call.real, self.last.shape)
        instead = jnp.where(merges[:, :, 0], self.last, -1)
        here = None if bias is None else bias[:, :, 0]
        pool, slot = self.pool.put(k[:, :, 0], v[:, :, 0], instead, live, here)
        q = call.q[..., 0, :]
        out = pool.attend_pages(q) if pool.by_kernel else pool.attend_one(q)[0]
        return out[..., None, :], pool, jnp.where(live, slot, self.last)

    def _many(
        self, call: Call, merges: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, Pool, jax.Array]:
        """Several tokens of every row: attention to each other and to the pool, which is then laid out anew."""
        real, (b, h, _) = call.real, merges.shape
        places = Tokens(call.tokens.positions, real.astype(jnp.int32))
        gone = jnp.concatenate([merges[:, :, 1:], jnp.zeros_like(merges[:, :, :1])], axis=2)
        keep, alive = jnp.where(gone, NEGATIVE, 0.0), real[:, None] & ~gone
        if call.fresh:
            out = attend(call.q, k, v, places, places, aligned=True, keep_bhs=keep, bias_bhs=bias)
            pool, _, to = self.pool.rebuild(None, k, v, alive, bias)
            last = self.last
        else:
            pages, page = self.k.shape[:2]
            joined = jnp.where(merges[:, :, 0], self.last, pages * page)
            until = jnp.full(pages * page, NEVER).at[joined].set(0, mode="drop").reshape(pages, page)
            out = attend_both(self.pool, call.q, k, v, places, keep, 0, until, bias)
            pool, moved, to = self.pool.rebuild(self.pool.there & (until > 0), k, v, alive, bias)
            last = moved[self.last]
        count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
        newest = jnp.broadcast_to(jnp.maximum(count - 1, 0)[..., None], (b, h, 1))
        return out, pool, jnp.where(count > 0, _take(to, newest)[..., 0], last)

    def copied(self, index_b: jax.Array, pages: int) -> DMCLayer:
        pool, last = self.pool.rows_of(index_b, self.last[index_b][..., None], pages)
        return self.replace(pool=pool, tail=jax.tree.map(lambda x: x[index_b], self.tail), last=last[..., 0])

    def after(self, other: DMCLayer) -> DMCLayer:
        tail = jax.tree.map(lambda *x: jnp.concatenate(x), self.tail, other.tail)
        last = jnp.concatenate([self.last, other.last + self.k.shape[0] * self.k.shape[1]])
        return self.replace(pool=self.pool.joined(other.pool), tail=tail, last=last)


def tokens(p_bht: jax.Array, call: Call, cfg: Settings) -> Element:
    """The elements of a call's tokens, which merge with probability p."""
    k = call.k if cfg.turned else decide.lend(call.k_plain, cfg, _fade(call))
    return Element.tokens(p_bht, call.said.w, k, call.v)


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
        cfg,
    )
    return stack_layers(layer, n)
