"""AdaKV (Feng et al., 2024): SnapKV with a budget that the heads of a layer share."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import Entries, keep_largest
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.layer import Sizes
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class AdaKV(SnapKV):
    """budget and ratio are means over the heads of a layer: the largest scores of all heads together stay, but every
    head keeps at least the share `floor` of the mean. A head keeps its number of entries after the prompt.

    Buffers have room for a head that keeps what all could have kept, so that entries are saved, and reads of them,
    but not memory.
    """

    name: ClassVar[str] = "adakv"
    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise AtomError(f"memory {self.name}: expected floor from 0 to 1, got {self.floor}")

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Entries of all heads together, unless that exceeds the capacity."""
        most = bucket(self.budget * sizes.h) if self.budget else math.ceil(capacity * self.ratio) * sizes.h
        return max(1, min(capacity, most))

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every head's floor, then the largest scores of the layer."""
        b, h, t = entries.pos.shape
        score, order = self.guarded(entries, length_b - 1, limit_bh), self.order(entries.pos)
        mean = jnp.minimum(limit_bh, length_b[:, None])
        least = jnp.floor(mean * self.floor + 1e-4).astype(jnp.int32)
        sure = keep_largest(score, order, least, self.digits)
        score = jnp.where(sure, jnp.inf, score).reshape(b, h * t)
        keep = keep_largest(score, order.reshape(b, h * t), mean.sum(1), self.digits).reshape(b, h, t)
        enough = length_b[:, None] <= limit_bh
        return keep, jnp.where(enough, limit_bh, jnp.sum(keep, axis=-1, dtype=jnp.int32))
