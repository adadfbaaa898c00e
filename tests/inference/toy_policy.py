"""A cache policy for tests: dense, but of every context only the first and the newest tokens stay in sight."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.policy import Policy
from atom_jax.nn.attention import Tokens, attend


@struct.dataclass
class ToyLayer(DenseLayer):
    """seen: i32 [b, budget], positions in sight (-1: none)."""

    seen: Any = None
    budget: int = struct.field(pytree_node=False, default=0)

    def extend(self, call):
        out, dense = DenseLayer(self.k, self.v).extend(call)
        if not call.fresh:
            b, _, c, _ = dense.k.shape
            slots = jnp.broadcast_to(jnp.arange(c)[None], (b, c))
            stored = jnp.any(slots[:, :, None] == self.seen[:, None], axis=2) | (slots >= call.length[:, None])
            stored &= slots < call.after[:, None]
            here = Tokens(call.tokens.positions, jnp.ones_like(call.tokens.segments))
            out = attend(call.q, dense.k, dense.v, here, Tokens(slots, stored.astype(jnp.int32)))
            return out, self.replace(k=dense.k, v=dense.v)
        recent = call.after[:, None] - 1 - jnp.arange(self.budget - 1)[None]
        seen = jnp.concatenate([jnp.zeros_like(recent[:, :1]), jnp.where(recent > 0, recent, -1)], axis=1)
        return out, self.replace(k=dense.k, v=dense.v, seen=seen)

    def grow(self, length_b, more: int):
        add = max(int(length_b.max()) + more - self.k.shape[-2], 0)
        pad = [(0, 0)] * (self.k.ndim - 2) + [(0, add), (0, 0)]
        return self.replace(k=jnp.pad(self.k, pad), v=jnp.pad(self.v, pad))

    def held(self, length_b: jax.Array):
        count = jnp.sum(self.seen >= 0, axis=1, dtype=jnp.int32)
        return jnp.broadcast_to(count[:, None], self.k.shape[:2])


@config.register
@dataclasses.dataclass(frozen=True)
class Toy(Policy):
    name: ClassVar[str] = "toy"
    budget: int = 512
    spare: int = 0

    def init(self, sizes, capacity, numbers):
        dense = DenseLayer.empty(sizes.b, sizes.h, capacity, sizes.k, sizes.dtype)
        seen = jnp.full((sizes.b, self.budget), -1, jnp.int32)
        return stack_layers(ToyLayer(dense.k, dense.v, seen, self.budget), len(numbers))
