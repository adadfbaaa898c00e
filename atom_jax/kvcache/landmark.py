"""The memory of landmark attention (`nn.landmark`): every key and value, and a key for every whole block of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.dense import bucket, put, widen
from atom_jax.kvcache.layer import Layer
from atom_jax.nn.attention import Tokens


@struct.dataclass
class LandmarkLayer(Layer):
    """k, v: [b, h, c, k], slot c holds the position c of its row. mark: [b, h, c / every, k], landmarks of blocks.
    nearest: blocks that a query reads, 0: all; static."""

    k: jax.Array
    v: jax.Array
    mark: jax.Array
    nearest: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(
        cls, b: int, h: int, capacity: int, k: int, every: int, nearest: int, dtype: Any
    ) -> LandmarkLayer:  # fmt: skip
        """A layer with room for `capacity` positions per row, in whole blocks of `every`."""
        blocks = -(-capacity // every)
        k_bhck, v_bhck, mark = (jnp.zeros((b, h, n, k), dtype) for n in (blocks * every, blocks * every, blocks))
        return cls(k_bhck, v_bhck, mark, nearest)

    @property
    def every(self) -> int:
        """Positions of a block."""
        return self.k.shape[-2] // self.mark.shape[-2]

    def write(
        self, k_bhtk: jax.Array, v_bhtk: jax.Array, mark_bhtk: jax.Array, tokens: Tokens, length_b: jax.Array
    ) -> LandmarkLayer:
        """See `nn.landmark.Held`."""
        offsets, real = jnp.arange(k_bhtk.shape[2])[None], tokens.segments > 0
        at, c, m = length_b[:, None] + offsets, self.k.shape[2], self.mark.shape[2]
        # Different places beyond the end, for the promise that no two are the same.
        slots = jnp.where(real, at, c + offsets)
        ends = jnp.where(real & (at % self.every == self.every - 1), at // self.every, m + offsets)
        k, v = put(self.k, k_bhtk, slots), put(self.v, v_bhtk, slots)
        return self.replace(k=k, v=v, mark=put(self.mark, mark_bhtk, ends))

    def grow(self, length_b: np.ndarray, more: int) -> LandmarkLayer:
        """Room for `more` positions after the longest row, in the next bucket, in whole blocks."""
        need = int(length_b.max()) + more
        if need <= self.k.shape[-2]:
            return self
        blocks, every = -(-bucket(need) // self.every), self.every
        return self.replace(
            k=widen(self.k, blocks * every), v=widen(self.v, blocks * every), mark=widen(self.mark, blocks)
        )

    def read(self, length_b: jax.Array) -> jax.Array:
        """The landmarks of whole blocks (half an entry each), the blocks that are read, and the query's own."""
        whole = jnp.maximum(length_b - 1, 0) // self.every
        read = whole if not self.nearest else jnp.minimum(whole, self.nearest)
        read_b = whole / 2 + (read - whole) * self.every + length_b
        return jnp.broadcast_to(read_b[:, None].astype(jnp.float32), self.k.shape[:2])
