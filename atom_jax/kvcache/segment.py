"""The cache of a layer that sees one segment of a text at a time, with the copies of a memory around it. Follows the
protocol `layer.Layer`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.dense import put
from atom_jax.kvcache.layer import Call, Layer
from atom_jax.nn.attention import Tokens, attend


@struct.dataclass
class SegmentLayer(Layer):
    """Keys and values of one layer, k, v [b, h, copies + segment + copies, k]: slot c holds what stands in place c of
    its row's segment. It never grows.

    In a `Call` of it `length` is the number of places that a row has filled, and positions are places. Elsewhere
    lengths count the row's tokens, of which the latest segment holds the last 1 to `segment`.
    """

    k: jax.Array
    v: jax.Array
    copies: int = struct.field(pytree_node=False)
    segment: int = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, b: int, h: int, k: int, dtype: Any, copies: int, segment: int) -> SegmentLayer:
        """A layer before the first token of b rows."""
        shape = (b, h, copies + segment + copies, k)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), copies, segment)

    def extend(self, call: Call) -> tuple[jax.Array, SegmentLayer]:
        """Stores what is new, of rows that have some, and attends; see `layer.Layer`."""
        b, slots = len(self.k), self.k.shape[2]
        offsets = jnp.arange(call.q.shape[3])[None]
        # Different places beyond the end, for the promise that no two are the same.
        at = jnp.where(call.real, call.length[:, None] + offsets, slots + offsets)
        state = self.replace(k=put(self.k, call.k, at), v=put(self.v, call.v, at))
        places = jnp.broadcast_to(jnp.arange(slots)[None], (b, slots))
        held = Tokens(places, (places < call.after[:, None]).astype(jnp.int32))
        here = Tokens(call.tokens.positions, jnp.ones_like(call.tokens.segments))
        return attend(call.q, state.k, state.v, here, held, window=call.window), state

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """No row ever is."""
        return jnp.zeros(length_b.shape, bool)

    def grow(self, length_b: np.ndarray, more: int) -> SegmentLayer:
        """Itself: there is room for any number of segments, one after another."""
        return self

    def held(self, length_b: jax.Array) -> jax.Array:
        """The copy that was read, and the tokens after it."""
        count = jnp.where(length_b > 0, self.copies + (length_b - 1) % self.segment + 1, 0)
        return jnp.broadcast_to(count[:, None], self.k.shape[:2])
