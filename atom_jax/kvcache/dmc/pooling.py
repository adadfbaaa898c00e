"""The means that entries are, for every token what its entry is once it has joined it: an associative scan.

An element stands for some tokens in a row, seen from the last of them. Elements are joined in any order, and joining
never cancels: the means of both are mixed by what they weigh (the paper's sums over their weights, divided at once).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

# Less than any weight of a token.
TINY = 1e-30


@struct.dataclass
class Element:
    """p: f32 [b, h, t], with what factor it takes along what came before. c: f32 [b, h, t], the sum of weights. e:
    f32 [b, h, t], the entropy of the weights in nats (log n where n tokens weigh the same). k, v: f32 [b, h, t, k],
    the weighted means of keys and values."""

    p: jax.Array
    c: jax.Array
    e: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def nothing(cls, b: int, h: int, t: int, size: int) -> Element:
        """Elements of no tokens."""
        no = jnp.zeros((b, h, t), jnp.float32)
        k = jnp.zeros((b, h, t, size), jnp.float32)
        return cls(no + 1.0, no, no, k, k)

    @classmethod
    def tokens(cls, p_bht: jax.Array, w_bht: jax.Array, k_bhtk: jax.Array, v_bhtk: jax.Array) -> Element:
        """Single tokens that merge with probability p and have weights w."""
        p, w, k, v = (x.astype(jnp.float32) for x in (p_bht, w_bht, k_bhtk, v_bhtk))
        return cls(p, w, jnp.zeros_like(w), k, v)

    def after(self, other: Element) -> Element:
        """Those first, then these."""
        c = self.p * other.c + self.c
        share = self.c / jnp.maximum(c, TINY)

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            u = share if old.ndim == 3 else share[..., None]
            return (1.0 - u) * old + u * new

        entropy = mix(other.e, self.e) + entropy_of(share)
        return Element(self.p * other.p, c, entropy, mix(other.k, self.k), mix(other.v, self.v))

    def back(self, tokens: int) -> Element:
        """What stood so many tokens before."""
        empty = Element.nothing(*self.k.shape[:2], tokens, self.k.shape[3])
        cut = lambda x: x[:, :, : x.shape[2] - tokens]  # noqa: E731
        return jax.tree.map(lambda a, b: jnp.concatenate([a, cut(b)], axis=2)[:, :, : b.shape[2]], empty, self)


def entropy_of(share: jax.Array) -> jax.Array:
    """Of a part and the rest, in nats; 0, and without a gradient, where it is all or nothing."""
    mixed = (share > 1e-6) & (share < 1.0 - 1e-6)
    u = jnp.where(mixed, share, 0.5)
    return jnp.where(mixed, -u * jnp.log(u) - (1.0 - u) * jnp.log1p(-u), 0.0)


def pooled(x: Element, span: int) -> Element:
    """Of every token all up to it, or the last `span` of them where that is not 0."""
    if span == 0:
        return jax.lax.associative_scan(lambda first, then: then.after(first), x, axis=2)
    # The last 12 are the last 4, and the 8 before these.
    found, length, block, size = None, 0, x, 1
    while True:
        if span & size:
            found = block if found is None else found.after(block.back(length))
            length += size
        if length == span:
            return found
        block, size = block.after(block.back(size)), 2 * size
