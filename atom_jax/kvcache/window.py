"""The memory of a sliding layer: a ring of the latest keys and values. Follows the protocol `layer.Layer`.

As the rolling buffer cache of Mistral 7B (Jiang et al., 2023, section 2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.dense import alone, bucket, put, widen
from atom_jax.kvcache.layer import Call, Layer
from atom_jax.nn.attention import Tokens, attend


@struct.dataclass
class WindowLayer(Layer):
    """Keys and values of one layer whose queries see `window` tokens, their own included.

    k, v: [b, h, c, k], where slot p mod c holds the token at position p of its row. c grows with the text up to
    `window`; from there on every token takes the place of one that no query sees any more.
    """

    k: jax.Array
    v: jax.Array
    window: int = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, b: int, h: int, capacity: int, k: int, dtype: Any, window: int) -> WindowLayer:
        """A layer with room for `capacity` tokens per row, or for any number where that is `window` or more."""
        shape = (b, h, min(capacity, window), k)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), window)

    def extend(self, call: Call) -> tuple[jax.Array, WindowLayer]:
        """Stores the new tokens, and attends; see `layer.Layer`."""
        positions, real = call.tokens.positions, jnp.ones_like(call.tokens.segments)
        if call.q.shape[3] == 1:
            state = self._write_one(call)
            held = state._held(call.after)
            return attend(call.q, state.k, state.v, Tokens(positions, real), held, window=self.window), state
        if call.fresh:
            return alone(call, self.window), self._write(call)
        held = self._held(call.length)
        k, v = (
            jnp.concatenate([old, new.astype(old.dtype)], axis=2) for old, new in ((self.k, call.k), (self.v, call.v))
        )
        here = Tokens(positions, real)
        there = Tokens(*(jnp.concatenate(both, axis=1) for both in (
            (held.positions, positions), (held.segments, call.real.astype(jnp.int32)),
        )))  # fmt: skip
        return attend(call.q, k, v, here, there, window=self.window), self._write(call)

    def _newest(self, length_b: jax.Array) -> jax.Array:
        """i32 [b, c]: the last position before `length` that belongs in each slot; negative where there is none."""
        last, slots = length_b[:, None] - 1, jnp.arange(self.k.shape[-2])[None]
        return last - (last - slots) % self.k.shape[-2]

    def _held(self, length_b: jax.Array) -> Tokens:
        """Where the stored tokens of rows of so many tokens stand."""
        newest = self._newest(length_b)
        return Tokens(newest, (newest >= 0).astype(jnp.int32))

    def _write_one(self, call: Call) -> WindowLayer:
        # Padding is written too, over a token that no later query sees, or past the end, where nothing is written.
        at_b = call.length if self.k.shape[-2] < self.window else call.length % self.window
        return self.replace(k=put(self.k, call.k, at_b[:, None]), v=put(self.v, call.v, at_b[:, None]))

    def _write(self, call: Call) -> WindowLayer:
        newest = self._newest(call.after)
        new_bc = newest >= call.length[:, None]
        source = jnp.clip(newest - call.length[:, None], 0, call.q.shape[3] - 1)

        def renewed(old: jax.Array, new: jax.Array) -> jax.Array:
            taken = jnp.take_along_axis(new.astype(old.dtype), source[:, None, :, None], axis=2)
            return jnp.where(new_bc[:, None, :, None], taken, old)

        return self.replace(k=renewed(self.k, call.k), v=renewed(self.v, call.v))

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """Rows whose next tokens do not fit: none of a whole ring."""
        capacity = self.k.shape[-2]
        return (length_b + more > capacity) & (capacity < self.window)

    def grow(self, length_b: np.ndarray, more: int) -> WindowLayer:
        """Room for `more` tokens after the longest row, in the next bucket, up to the window."""
        need, slots = int(length_b.max()) + more, self.k.shape[-2]
        if need <= slots or slots == self.window:
            return self
        size = min(bucket(need), self.window)
        return self.replace(k=widen(self.k, size), v=widen(self.v, size))

    def held(self, length_b: jax.Array) -> jax.Array:
        """The latest tokens."""
        return jnp.broadcast_to(jnp.minimum(length_b, self.window)[:, None], self.k.shape[:2])
