"""The memory of kNN attention (`nn.knn_attention`): a ring of keys and values, most of which are searched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.dense import put, widen
from atom_jax.kvcache.window import WindowLayer
from atom_jax.nn.attention import Tokens
from atom_jax.nn.knn_attention import Keys


@struct.dataclass
class KnnLayer(WindowLayer):
    """A ring (see `WindowLayer`) of keys before RoPE and values of the newest `window` positions.

    inverse: f32 [b, h, c], one over the norms of the keys. near: newest positions, which are not searched; nearest:
    keys that a query reads of the others; static.
    """

    inverse: jax.Array
    near: int = struct.field(pytree_node=False)
    nearest: int = struct.field(pytree_node=False)

    @classmethod
    def empty(
        cls, b: int, h: int, capacity: int, k: int, dtype: Any, window: int, near: int = 1, nearest: int = 1
    ) -> KnnLayer:
        """A layer with room for `capacity` positions per row, or for any number where that is `window` or more."""
        ring = WindowLayer.empty(b, h, capacity, k, dtype, window)
        inverse = jnp.zeros(ring.k.shape[:-1], jnp.float32)
        return cls(ring.k, ring.v, window, inverse, near, nearest)

    def keys(self, length_b: jax.Array) -> tuple[Keys, Tokens]:
        """See `nn.knn_attention.Held`."""
        return Keys(self.k, self.v, self.inverse), self._held(length_b)

    def latest(self, count: int, length_b: jax.Array) -> tuple[Keys, Tokens]:
        """See `nn.knn_attention.Held`."""
        at = length_b[:, None] + jnp.arange(-count, 0)[None]
        slots = (at % self.k.shape[-2])[:, None]
        k, v = (jnp.take_along_axis(x, slots[..., None], axis=2) for x in (self.k, self.v))
        inverse = jnp.take_along_axis(self.inverse, slots, axis=2)
        return Keys(k, v, inverse), Tokens(at, (at >= 0).astype(jnp.int32))

    def write(self, new: Keys, tokens: Tokens, length_b: jax.Array) -> KnnLayer:
        """See `nn.knn_attention.Held`; of more than the ring holds the last ones remain."""
        t, c = new.k.shape[2], self.k.shape[2]
        offsets = jnp.arange(t)[None]
        at, after = length_b[:, None] + offsets, length_b + jnp.sum(tokens.segments > 0, axis=1)
        stays = (tokens.segments > 0) & (at >= after[:, None] - c)
        # Different places beyond the end, for the promise that no two are the same.
        slots = jnp.where(stays, at % c if c == self.window else at, c + at)
        k, v = put(self.k, new.k, slots), put(self.v, new.v, slots)
        return self.replace(k=k, v=v, inverse=put(self.inverse[..., None], new.inverse[..., None], slots)[..., 0])

    def grow(self, length_b: np.ndarray, more: int) -> KnnLayer:
        """As a ring does."""
        ring = super().grow(length_b, more)
        if ring is self:
            return self
        return ring.replace(inverse=widen(self.inverse[..., None], ring.k.shape[-2])[..., 0])

    def read(self, length_b: jax.Array) -> jax.Array:
        """The newest positions, all older keys (half an entry each), and the neighbours."""
        older_b = jnp.clip(length_b - self.near, 0, self.window - self.near)
        read_b = jnp.minimum(length_b, self.near) + older_b / 2 + jnp.minimum(older_b, self.nearest)
        return jnp.broadcast_to(read_b[:, None].astype(jnp.float32), self.k.shape[:2])
