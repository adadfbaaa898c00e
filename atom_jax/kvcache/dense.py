"""The cache that keeps every key and value; `layer.Layer` is the protocol that it follows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.layer import Call, Layer
from atom_jax.nn.attention import Tokens, attend, attend_parts
from atom_jax.sharding import split
from pallas_kernels.cache_attention.api import cache_attention, fits, in_pages
from pallas_kernels.dispatch import choose

# Sizes of the pages in which a TPU reads a dense cache.
PAGES = (128, 64, 32, 16)
# Tokens of a draft that are read without laying them beside what is stored.
FEW = 32


@struct.dataclass
class DenseLayer(Layer):
    """Keys and values of one layer: k, v [b, h, c, k], where slot c holds the token at position c of its row."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, b: int, h: int, capacity: int, k: int, dtype: Any) -> DenseLayer:
        """A layer with room for `capacity` tokens per row."""
        return cls(*(jnp.zeros((b, h, capacity, k), dtype) for _ in range(2)))

    def write(self, k_bhtk: jax.Array, v_bhtk: jax.Array, start_b: jax.Array) -> DenseLayer:
        """Stores t new tokens of every row from its slot start_b on; a single one beyond the capacity is dropped."""

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            if new.shape[2] == 1:
                return put(old, new, start_b[:, None])
            return jax.vmap(lambda o, n, i: jax.lax.dynamic_update_slice(o, n, (0, i, 0)))(
                old, new.astype(old.dtype), start_b
            )

        return DenseLayer(write(self.k, k_bhtk), write(self.v, v_bhtk))

    def _attend(self, q_bhgtk: jax.Array, q: Tokens, length_b: jax.Array, window: int | None) -> jax.Array:
        """Attention of t queries per row to the `length_b` tokens stored (those of this call included)."""
        b, h, capacity, _ = self.k.shape
        page = next((n for n in PAGES if capacity % n == 0 and fits(n, self.k.dtype)), None)
        if choose(None) != "reference" and q_bhgtk.shape[3] == 1 and window is None and page:
            heads = ("batch", "kv_heads")
            attend_held = functools.partial(_attend_held, page=page)
            lengths = jnp.broadcast_to(length_b[:, None], (b, h))
            return split(attend_held, (heads,) * 4, heads, q_bhgtk, self.k, self.v, lengths)
        slots = jnp.broadcast_to(jnp.arange(capacity)[None], (b, capacity))
        stored = (slots < length_b[:, None]).astype(jnp.int32)
        return attend(q_bhgtk, self.k, self.v, q, Tokens(slots, stored), window=window)

    def extend(self, call: Call) -> tuple[jax.Array, DenseLayer]:
        """Stores the new tokens, and attends; see `layer.Layer`."""
        state = self.write(call.k, call.v, call.length)
        if call.fresh and call.q.shape[3] > 1:
            return alone(call, call.window), state
        here = Tokens(call.tokens.positions, jnp.ones_like(call.tokens.segments))
        return state._attend(call.q, here, call.after, call.window), state

    def attend(self, call: Call) -> jax.Array:
        """Few tokens read what is stored where it lies, and each other."""
        if call.q.shape[3] > FEW:
            return self.extend(call)[0]
        b, _, capacity, _ = self.k.shape
        slots = jnp.broadcast_to(jnp.arange(capacity)[None], (b, capacity))
        held = Tokens(slots, (slots < call.length[:, None]).astype(jnp.int32))
        here = Tokens(call.tokens.positions, jnp.ones_like(call.tokens.segments))
        parts = (self.k, self.v, held), (call.k, call.v, call.tokens)
        return attend_parts(call.q, parts, here, window=call.window)

    def store(self, call: Call) -> DenseLayer:
        """Writes the real tokens and nothing else."""
        t, capacity = call.k.shape[2], self.k.shape[2]
        if t > FEW:
            return self.extend(call)[1]
        offsets = jnp.arange(t)[None]
        # Different places beyond the end, for the promise that no two are the same.
        at = jnp.where(call.real, call.length[:, None] + offsets, capacity + offsets)
        return DenseLayer(put(self.k, call.k, at), put(self.v, call.v, at))

    def grow(self, length_b: np.ndarray, more: int) -> DenseLayer:
        """Room for `more` tokens after the longest row, in the next bucket."""
        need = int(length_b.max()) + more
        if need <= self.k.shape[-2]:
            return self
        return DenseLayer(widen(self.k, bucket(need)), widen(self.v, bucket(need)))

    def sized(self, slots: int) -> DenseLayer:
        """The first so many slots, or empty ones behind."""
        return DenseLayer(*(widen(x[..., :slots, :], slots) for x in (self.k, self.v)))


def alone(call: Call, window: int | None) -> jax.Array:
    """Attention [b, h, g, t, k] of the first tokens of every row to each other, fewer than `window` places back."""
    return attend(call.q, call.k, call.v, call.tokens, call.tokens, window=window, aligned=True, single=True)


def put(old_bhck: jax.Array, new_bhtk: jax.Array, at_bt: jax.Array) -> jax.Array:
    """`old` with t new vectors per row and head in its slots at_bt, i32, all different; past the end nothing is
    written."""
    # One scatter index per row, head and token: XLA then updates in place, where other forms copy.
    rows, heads = (jnp.arange(n) for n in old_bhck.shape[:2])
    at = old_bhck.at[rows[:, None, None], heads[None, :, None], at_bt[:, None]]
    return at.set(new_bhtk.astype(old_bhck.dtype), mode="drop", unique_indices=True)


def widen(x: jax.Array, slots: int) -> jax.Array:
    """x [..., c, k] with zeros behind, for so many slots."""
    return jnp.pad(x, [(0, slots - n if i == x.ndim - 2 else 0) for i, n in enumerate(x.shape)])


def _attend_held(
    q_bhg1k: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, lengths_bh: jax.Array, page: int
) -> jax.Array:
    """Attention of one query to the tokens stored, of which only the pages in use are read."""
    (k_pck, table), (v_pck, _) = in_pages(k_bhsk, page), in_pages(v_bhsk, page)
    q_bhgk = q_bhg1k[..., 0, :].astype(k_bhsk.dtype)
    return cache_attention(q_bhgk, k_pck, v_pck, lengths_bh, table)[0][..., None, :].astype(q_bhg1k.dtype)


def bucket(n: int, least: int = 16) -> int:
    """The first of 16, 24, 32, 48, 64, 96, ... that is at least `n` and `least`."""
    size = 16
    while size < max(n, least):
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
