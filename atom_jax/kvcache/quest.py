"""Quest (Tang et al., 2024): everything is stored, and a query reads the pages that may matter most to it."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, tied
from atom_jax.kvcache.dense import DenseLayer, bucket
from atom_jax.kvcache.layer import Call, Layer, Sizes, stack_layers
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Quest(Budget):
    """budget or ratio: entries that a single token reads besides its own page, in whole pages (at least one).

    A page has the least and the largest value of every channel of its keys; from these follows a bound on the scores
    of a query, and the pages with the largest bounds, summed over the query heads of the group, are read. Calls with
    several tokens read everything. (The paper reads everything in the first two layers; here all are alike.)
    sinks: pages with positions below it are always chosen. page: entries per page.
    """

    name: ClassVar[str] = "quest"
    slides: ClassVar[bool] = False
    page: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.prompt_only:
            raise AtomError(f"memory {self.name}: prompt_only is for policies that evict; this one keeps everything")
        if self.page < 1:
            raise AtomError(f"memory {self.name}: expected page of at least 1, got {self.page}")

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> QuestLayer:
        """Empty buffers, as long as the dense ones, and page statistics."""
        most = self.budget or math.ceil(capacity * self.ratio)
        return stack_layers(QuestLayer.empty(self, sizes, capacity, max(1, -(-most // self.page))), len(numbers))

    def expected(self, length: int) -> int:
        """Everything, and the two vectors of a page as one entry."""
        return length + -(-length // self.page)


@struct.dataclass
class QuestLayer(Layer):
    """The memory of one layer.

    k, v: [b, h, c, k], slot i for position i; c is a multiple of the page. low, high: [b, h, c / page, k], least and
    largest values of the keys in a page. limit: i32 [b, h], pages that a token reads besides its own; most (static):
    no limit is larger. policy: static.
    """

    k: jax.Array
    v: jax.Array
    low: jax.Array
    high: jax.Array
    limit: jax.Array
    most: int = struct.field(pytree_node=False, default=1)
    policy: Quest = struct.field(pytree_node=False, default=None)

    free: ClassVar[dict[str, float]] = {"low": np.inf, "high": -np.inf}

    @classmethod
    def empty(cls, policy: Quest, sizes: Sizes, capacity: int, most: int) -> QuestLayer:
        """A layer with room for `capacity` tokens per row."""
        pages = -(-capacity // policy.page)
        k, v = (jnp.zeros((sizes.b, sizes.h, pages * policy.page, sizes.k), sizes.dtype) for _ in range(2))
        low = jnp.full((sizes.b, sizes.h, pages, sizes.k), jnp.inf, sizes.dtype)
        limit = jnp.full((sizes.b, sizes.h), max(1, policy.budget // policy.page), jnp.int32)
        return cls(k, v, low, -low, limit, most, policy)

    def extend(self, call: Call) -> tuple[jax.Array, QuestLayer]:
        """Stores the new tokens; a single one attends to some pages, several to everything."""
        if call.fresh or call.k.shape[2] > 1:
            out, dense = DenseLayer(self.k, self.v).extend(call)
            limit = self.limit
            if call.fresh and not self.policy.budget:
                share = self.policy.share(call.after, call.k.shape[2]) // self.policy.page
                limit = jnp.broadcast_to(jnp.maximum(share, 1)[:, None], limit.shape)
            return out, self.replace(k=dense.k, v=dense.v, limit=limit)._measured(call.after)
        new = self._write(call)
        index, used = new._choose(call.q[..., 0, :], call.after)
        page = self.policy.page
        pos = index[..., None] * page + jnp.arange(page)[None, None, None]
        pos = jnp.where(used[..., None] & (pos < call.after[:, None, None, None]), pos, -1)
        flat = (*pos.shape[:2], -1)
        k, v = (
            jnp.take_along_axis(new._pages(x), index[..., None, None], axis=2).reshape(*flat, x.shape[-1])
            for x in (new.k, new.v)
        )
        out, _ = observe.attend_one(call.q[..., 0, :], k, v, pos.reshape(flat) >= 0)
        return out[..., None, :], new

    def put(self, index_b: np.ndarray, other: QuestLayer, axis: int = 0) -> QuestLayer:
        """As of `Layer`; `most` is the larger one."""
        most = max(self.most, other.most)
        return Layer.put(self.replace(most=most), index_b, other.replace(most=most), axis)

    def _pages(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.policy.page, x.shape[-1])

    def _measured(self, length_b: jax.Array) -> QuestLayer:
        """Statistics of all pages anew."""
        held = jnp.arange(self.k.shape[2])[None] < length_b[:, None]
        held = jnp.broadcast_to(held[:, None, :, None], self.k.shape)
        low = self._pages(jnp.where(held, self.k, jnp.inf)).min(3)
        return self.replace(low=low, high=self._pages(jnp.where(held, self.k, -jnp.inf)).max(3))

    def _write(self, call: Call) -> QuestLayer:
        """With a single token per row."""
        b, h, c, _ = self.k.shape
        slot = jnp.where(call.real[:, 0], call.length, c)
        dense = DenseLayer(self.k, self.v).write(call.k, call.v, slot)
        page = jnp.where(call.real, call.length[:, None] // self.policy.page, self.low.shape[2])
        at = (jnp.arange(b)[:, None], jnp.arange(h)[None], page)
        k = call.k[:, :, 0].astype(self.k.dtype)
        low = self.low.at[at].min(k, mode="drop", unique_indices=True)
        high = self.high.at[at].max(k, mode="drop", unique_indices=True)
        return self.replace(k=dense.k, v=dense.v, low=low, high=high)

    def _choose(self, q_bhgk: jax.Array, length_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pages to read, i32 [b, h, n], the current one last, and which of them count, bool [b, h, n]."""
        q = q_bhgk.astype(jnp.float32)
        number, current = (
            jnp.arange(self.low.shape[2]),
            jnp.maximum(length_b - 1, 0)[:, None, None] // self.policy.page,
        )
        past = jnp.broadcast_to(number[None, None] < current, self.low.shape[:3])
        # Empty pages have infinite bounds.
        low, high = (jnp.where(past[..., None], x.astype(jnp.float32), 0.0) for x in (self.low, self.high))
        bound = jnp.einsum("bhgk,bhpk->bhp", jnp.maximum(q, 0.0), high)
        bound += jnp.einsum("bhgk,bhpk->bhp", jnp.minimum(q, 0.0), low)
        sink = jnp.broadcast_to((number * self.policy.page < self.policy.sinks)[None, None], past.shape)
        bound = jnp.where(past, jnp.where(sink, jnp.inf, bound), -jnp.inf)
        most = min(self.most, bound.shape[-1])
        best = jax.lax.top_k(bound, most)[0]
        at = jnp.take_along_axis(best, jnp.clip(self.limit - 1, 0, most - 1)[..., None], axis=-1)
        # Of tied bounds the first pages are read.
        place = jnp.where(tied(bound, at, self.policy.digits), 1, jnp.where(bound > at, 2, 0))
        index = jax.lax.top_k(place, most)[1]
        used = (jnp.arange(index.shape[-1])[None, None] < self.limit[..., None]) & (best > -jnp.inf)
        current = jnp.broadcast_to(current, (*index.shape[:2], 1))
        return jnp.concatenate([index, current], -1), jnp.concatenate([used, jnp.ones_like(current, bool)], -1)

    def grow(self, length_b: np.ndarray, more: int) -> QuestLayer:
        """Room for `more` tokens after the longest row."""
        need = int(length_b.max()) + more
        if need <= self.k.shape[-2]:
            return self
        add = -(-bucket(need) // self.policy.page) - self.low.shape[-2]

        def pad(x: jax.Array, n: int, fill: float) -> jax.Array:
            return jnp.pad(x, [(0, n if i == x.ndim - 2 else 0) for i in range(x.ndim)], constant_values=fill)

        k, v = (pad(x, add * self.policy.page, 0) for x in (self.k, self.v))
        return self.replace(k=k, v=v, low=pad(self.low, add, jnp.inf), high=pad(self.high, add, -jnp.inf))

    def held(self, length_b: jax.Array) -> jax.Array:
        """Every token, and the two vectors of a page as one entry."""
        pages = -(-length_b // self.policy.page)
        return jnp.broadcast_to((length_b + pages)[:, None], self.k.shape[:2])

    def read(self, length_b: jax.Array) -> jax.Array:
        """Chosen pages, the tokens of the current one, and all page statistics."""
        page = self.policy.page
        past = jnp.maximum(length_b - 1, 0) // page
        chosen = jnp.minimum(self.limit, past[:, None]) * page
        rest = length_b - past * page - (-length_b // page)
        return (chosen + rest[:, None]).astype(jnp.float32)
