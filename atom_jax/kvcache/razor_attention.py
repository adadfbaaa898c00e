"""RazorAttention (Tang et al., 2024): retrieval heads keep everything, others what is near and a mean of the rest.

Which heads retrieve is found once per model: `transfer.retrieval_heads`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.kvcache.budget import FAR, BudgetLayer, Entries, put
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.streaming_llm import StreamingLLM
from atom_jax.typing import AtomError


@struct.dataclass
class Mean:
    """Of the tokens that an entry stands for: keys and values k, v [b, h, k] float32. Their number is the exponential
    of the entry's bias."""

    k: jax.Array
    v: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class RazorAttention(StreamingLLM):
    """budget or ratio: what heads that do not retrieve keep: the `sinks` first tokens, one entry for everything
    between, and the newest tokens; with a ratio, at least `least` newest ones.

    The entry between has the mean of the keys (as they are rotated) and of the values of the n tokens that it stands
    for, and log n is added to its score: if they were all alike, attention would be exact. It has the position after
    the sinks. Buffers are as long as those of the heads that keep everything.
    heads: (layer, key/value head) of those that retrieve.
    """

    name: ClassVar[str] = "razor_attention"
    biased: ClassVar[bool] = True
    slides: ClassVar[bool] = False
    least: int = 4000
    heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "heads", tuple(map(tuple, self.heads)))
        if any(len(pair) != 2 for pair in self.heads):
            raise AtomError(f"memory {self.name}: expected heads as pairs of a layer and a head, got {self.heads}")
        if self.least < 1 or (self.budget and self.budget < self.sinks + 2):
            raise AtomError(f"memory {self.name}: expected least of at least 1 and a budget of at least sinks + 2")

    @property
    def fixed(self) -> int:
        """The sinks, and the entry after them."""
        return self.sinks + 1

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Everything."""
        return capacity

    def expected(self, length: int) -> int:
        """Everything: any head may retrieve."""
        return length

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> BudgetLayer:
        """Empty buffers, and the means of nothing."""
        nothing = jnp.zeros((len(numbers), sizes.b, sizes.h, sizes.k))
        return super().init(sizes, capacity, numbers).replace(extra=Mean(nothing, nothing))

    def allow(self, layer: BudgetLayer, call: Call) -> jax.Array:
        """No limit for heads that retrieve."""
        limit, (_, h) = layer.limit, layer.limit.shape
        if not self.budget:
            near = jnp.maximum(self.share(call.after, call.k.shape[2]), self.least) + self.fixed
            limit = jnp.broadcast_to(near[:, None], limit.shape)
        layers, heads = (jnp.array([pair[n] for pair in self.heads], jnp.int32) for n in range(2))
        found = jnp.any((layers[:, None] == call.layer) & (heads[:, None] == jnp.arange(h)[None]), axis=0)
        return jnp.where(jnp.broadcast_to(found[None], limit.shape), FAR, limit)

    def gather(self, layer: BudgetLayer, entries: Entries, keep: jax.Array) -> tuple[BudgetLayer, Entries]:
        """The entry after the sinks takes up all that leave."""
        middle = (entries.pos == self.sinks)[..., None]
        taken = ((entries.pos >= 0) & ~keep)[..., None] | middle
        count = jnp.maximum(taken.sum(2), 1)
        k, v = (jnp.sum(jnp.where(taken, x.astype(jnp.float32), 0.0), axis=2) / count for x in (entries.k, entries.v))
        new = [jnp.where(middle, m[:, :, None].astype(x.dtype), x) for m, x in ((k, entries.k), (v, entries.v))]
        bias = jnp.where(middle[..., 0], jnp.log(count.astype(jnp.float32)), 0.0)
        return layer.replace(extra=Mean(k, v)), entries.replace(k=new[0], v=new[1], bias=bias)

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """The entry after the sinks takes up one more."""
        at = jnp.argmax(layer.pos == self.sinks, axis=-1)[..., None]
        gone = jnp.minimum(slot_bh, layer.k.shape[2] - 1)[..., None]
        take = lambda x, i: jnp.take_along_axis(x, i[..., None], axis=2)[:, :, 0].astype(jnp.float32)  # noqa: E731
        bias = jnp.take_along_axis(layer.bias, at, axis=2)
        share = jnp.where(live_bh[..., None], 1.0 / (jnp.exp(bias) + 1.0), 0.0)
        # Of a text that was shorter than the sinks when its prompt was read, the entry is a token so far.
        old = [jnp.where(bias > 0, m, take(x, at)) for m, x in ((layer.extra.k, layer.k), (layer.extra.v, layer.v))]
        mean = Mean(*(m + share * (take(x, gone) - m) for m, x in zip(old, (layer.k, layer.v))))
        bias = jnp.where(live_bh[..., None], jnp.log1p(jnp.exp(bias)), bias)
        # Past the end, where nothing is written, in heads that lose nothing.
        where = jnp.where(live_bh, at[..., 0], layer.k.shape[2])
        k, v, bias = (
            put(old, new, where) for old, new in ((layer.k, mean.k), (layer.v, mean.v), (layer.bias, bias[..., 0]))
        )
        return layer.replace(k=k, v=v, bias=bias, extra=mean)
