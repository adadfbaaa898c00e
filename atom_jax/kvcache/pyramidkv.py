"""PyramidKV (Cai et al., 2024): SnapKV with more entries in lower layers than in higher ones."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.kvcache.budget import BudgetLayer
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """budget and ratio are means over layers. Beyond the window, entries fall linearly from layer to layer, to 1/beta
    of the mean in the last one. With a ratio, no layer is given more than the prompt; the rest goes to higher layers.
    All layers where the mean does not exceed the window get the mean. Buffers are as long as the largest layer's.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 1:
            raise AtomError(f"memory {self.name}: expected beta of at least 1, got {self.beta}")

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> BudgetLayer:
        """Limits of all layers; extra: each layer's place from 1 (first) to 0 (last), f32 [b, 1]."""
        place = np.linspace(1.0, 0.0, sizes.layers) if sizes.layers > 1 else np.full(1, 0.5)
        place = jnp.asarray(place[list(numbers)], jnp.float32)[:, None, None]
        state = super().init(sizes, capacity, numbers)
        state = state.replace(extra=jnp.broadcast_to(place, (len(numbers), sizes.b, 1)))
        if not self.budget:
            return state
        limit = jnp.asarray(self.budgets(sizes.layers), jnp.int32)[jnp.array(numbers)]
        return state.replace(limit=jnp.broadcast_to(limit[:, None, None], state.limit.shape))

    def budgets(self, layers: int) -> list[int]:
        """Entries of every layer for a mean of `budget`."""
        past = max(self.budget - self.window, 0)
        low, high = past / self.beta, 2 * past - past / self.beta
        if not past or layers == 1:
            return [self.budget] * layers
        return [self.window + round(high - (high - low) * i / (layers - 1)) for i in range(layers)]

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Entries of the first layer."""
        if self.budget:
            return min(capacity, max(self.budgets(sizes.layers)))
        return min(capacity, self.window + math.ceil(2 * capacity * self.ratio))

    def allow(self, layer: BudgetLayer, call: Call) -> jax.Array:
        """This layer's part of the mean."""
        if self.budget:
            return layer.limit
        mean = self.share(call.after, call.k.shape[2])
        past = jnp.maximum(mean - self.window, 0).astype(jnp.float32)
        high = jnp.minimum(past * (2 - 1 / self.beta), (call.after - self.window).astype(jnp.float32))
        low = 2 * past - high
        own = self.window + jnp.round(low + (high - low) * layer.extra[:, 0]).astype(jnp.int32)
        return jnp.broadcast_to(jnp.where(past > 0, own, mean)[:, None], layer.limit.shape)
