"""What token reducers take and give, and what is done with it.

A reduction says where every token of a row goes: to one of m slots, or nowhere. Slots with one token are pruning,
those with several are merging; as a matrix [m, p] every row is one-hot or a weighted average.

Dimension letters besides those of `atom_jax.typing`: p tokens before, m after, d width, k key size, l layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.typing import AtomError


@struct.dataclass
class Seen:
    """What a reducer may look at.

    x:         [b, p, d] the tokens; `protected` ones first, then those of the grid in the image's order.
    key:       [b, p, k] what likeness is measured by (attention keys, averaged over heads); None: x.
    attention: f32 [b, l, p] attention that every token got in the layers so far, averaged over heads and queries (or
               from the class token), or None.
    thumbnail: f32 [b, height, width] attention of another pass, over a small version of the whole image, or None.
    grid:      (height, width) in tokens, or None after an earlier reduction.
    protected: how many tokens at the beginning stay as they are: 0, 1 (class token) or 2 (and distillation token).
    """

    x: jax.Array
    key: jax.Array | None = None
    attention: jax.Array | None = None
    thumbnail: jax.Array | None = None
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    protected: int = struct.field(pytree_node=False, default=0)

    @property
    def metric(self) -> jax.Array:
        """f32 [b, p, k]: keys (or tokens) of length one; zeros stay zeros."""
        key = (self.x if self.key is None else self.key).astype(jnp.float32)
        return key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-30)

    def places(self, name: str) -> tuple[int, int]:
        """The grid. Raises AtomError, for the reducer `name`, where the tokens don't fill one."""
        if self.grid is None or self.grid[0] * self.grid[1] != self.x.shape[1]:
            raise AtomError(f"{name}: needs tokens that fill a grid; there are {self.x.shape[1]} for {self.grid}")
        return self.grid

    def received(self, name: str, layer: int) -> jax.Array:
        """f32 [b, p]: attention in a layer. Raises AtomError, for the reducer `name`, where it isn't known."""
        layers = 0 if self.attention is None else self.attention.shape[1]
        if not -layers <= layer < layers:
            raise AtomError(f"{name}: needs the attention of layer {layer}; that of {layers} layers is known")
        return self.attention[:, layer].astype(jnp.float32)


@struct.dataclass
class Reduction:
    """Where tokens go.

    slot:  i32 [b, p] in [0, m]; m = dropped.
    share: f32 [b, p] weight of a token in its slot, beside the number of tokens that it stands for; 0 = none.
    size:  f32 [b, m] tokens in a slot (their shares); 0 = unused.
    at:    i32 [b, m] the token that lends the slot its position; 0 in unused ones.
    """

    slot: jax.Array
    share: jax.Array
    size: jax.Array
    at: jax.Array

    @property
    def m(self) -> int:
        """Slots per row."""
        return self.size.shape[1]


def identity(b: int, p: int) -> Reduction:
    """Every token keeps a slot of its own."""
    slot = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None], (b, p))
    ones = jnp.ones((b, p), jnp.float32)
    return Reduction(slot, ones, ones, slot)


def merged(slot: jax.Array, lends: jax.Array, m: int) -> Reduction:
    """The reduction with these slots i32 [b, p], in which tokens count alike. lends: bool [b, p], of every slot in
    use one token, whose position it gets."""
    share = (slot < m).astype(jnp.float32)
    index = jnp.where(lends, jnp.arange(slot.shape[1], dtype=jnp.int32)[None], 0)
    return Reduction(slot.astype(jnp.int32), share, _sum(share, slot, m), _sum(index, slot, m))


def kept(keep: jax.Array, m: int) -> Reduction:
    """The reduction in which the tokens bool [b, p] stay (at most m of every row), in their order, and others go."""
    return merged(jnp.where(keep, jnp.minimum(_number(keep), m), m), keep, m)


def joined(keep: jax.Array, metric: jax.Array, m: int) -> Reduction:
    """As `kept`, but others go to the one most like them of those that stay (m of every row): metric [b, p, k]."""
    at = kept(keep, m).at
    stay = jnp.take_along_axis(metric, at[..., None], axis=1)
    nearest = jnp.argmax(jnp.einsum("bpk,bmk->bpm", metric, stay), axis=2)
    return merged(jnp.where(keep, _number(keep), nearest), keep, m)


def rank(score: jax.Array) -> jax.Array:
    """i32 [..., p]: how many tokens have a higher score, or the same and come earlier."""
    order = jnp.argsort(score, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1)


def apply(x: jax.Array, size: jax.Array | None, reduction: Reduction) -> tuple[jax.Array, jax.Array]:
    """Averages of the tokens of every slot, weighted by share and size.

    Args: x [b, p, d] of any float dtype; size f32 [b, p] tokens that each of them stands for (None: 1 each).
    Returns: [b, m, d] in the dtype of x, zero in unused slots, and their sizes f32 [b, m].
    """
    weight = reduction.share if size is None else reduction.share * size
    total = _sum(weight, reduction.slot, reduction.m)
    y = _sum(x.astype(jnp.float32) * weight[..., None], reduction.slot, reduction.m)
    y = y / jnp.where(total > 0, total, 1.0)[..., None]
    return y.astype(x.dtype), total


def largest(x: jax.Array, reduction: Reduction) -> jax.Array:
    """The greatest value in every slot, for each channel: x [b, p, d] to [b, m, d]; zero in unused slots."""
    high = jax.vmap(lambda row, slot: jax.ops.segment_max(row, slot, reduction.m + 1)[:-1])(x, reduction.slot)
    return jnp.where(reduction.size[..., None] > 0, high, jnp.zeros_like(high))


def expand(y: jax.Array, reduction: Reduction) -> jax.Array:
    """What every token's slot holds: y [b, m, d] to [b, p, d]; zero where the token was dropped."""
    y = jnp.pad(y, ((0, 0), (0, 1), (0, 0)))
    return jnp.take_along_axis(y, reduction.slot[..., None], axis=1)


def trace(one: Reduction, two: Reduction) -> Reduction:
    """The reduction that does `one`, then `two` (with the sizes that `one` leaves)."""
    slot, share = (
        jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 1)), constant_values=dropped), one.slot, axis=1)
        for values, dropped in ((two.slot, two.m), (two.share, 0.0))
    )
    share = one.share * share
    return Reduction(slot, share, _sum(share, slot, two.m), jnp.take_along_axis(one.at, two.at, axis=1))


def source(reduction: Reduction) -> jax.Array:
    """bool [b, m, p]: which tokens every slot holds."""
    return reduction.slot[:, None] == jnp.arange(reduction.m)[None, :, None]


def _sum(values: jax.Array, slot: jax.Array, m: int) -> jax.Array:
    """Sums of values [b, p, ...] over every slot: [b, m, ...]."""
    return jax.vmap(lambda row, to: jax.ops.segment_sum(row, to, m + 1)[:-1])(values, slot)


def _number(keep: jax.Array) -> jax.Array:
    """i32 [b, p]: how many tokens before each one stay."""
    return jnp.cumsum(keep, axis=1, dtype=jnp.int32) - keep
