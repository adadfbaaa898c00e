"""What every cache policy offers: the one protocol between models and their memory.

A policy is a frozen, registered configuration (`Policy`); `TransformerConfig.memory` holds one, or None for the dense
cache. Its `init` makes the state of all layers, stacked over a leading axis; the state of one layer is a pytree with
the methods of `Layer`. Adding a policy is one file with both and one line in `kvcache/policies.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens


class Sizes(NamedTuple):
    """Of a model and a batch: layers, rows, key/value heads, query heads per key/value head, head size; the dtype of
    keys and values; and RoPE's (theta, scaling) in full-attention layers."""

    layers: int
    b: int
    h: int
    g: int
    k: int
    dtype: Any
    rope: tuple = (10000.0, None)


@struct.dataclass
class Call:
    """t new tokens of every row, for one layer.

    q: [b, h, g, t, k], k, v: [b, h, t, k], turned by RoPE. tokens: where they stand; padding (segment 0) comes last.
    length: i32 [b], tokens that the row had before. z: f32 [b, h, t], decision logits of learned evictors, or None;
    learned: their parameters.
    window: of a sliding layer, else None. fresh: nothing is stored yet. rope: as in Sizes. All three are static.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: Tokens
    length: jax.Array
    z: Any = None
    learned: Any = None
    window: int | None = struct.field(pytree_node=False, default=None)
    fresh: bool = struct.field(pytree_node=False, default=False)
    rope: tuple = struct.field(pytree_node=False, default=(10000.0, None))

    @property
    def real(self) -> jax.Array:
        """bool [b, t]: tokens that are not padding."""
        return self.tokens.segments > 0

    @property
    def after(self) -> jax.Array:
        """i32 [b]: tokens of every row once these are read."""
        return self.length + jnp.sum(self.real, axis=1, dtype=jnp.int32)


class Layer(Protocol):
    """The memory of one layer: a pytree of arrays without a layer axis, `k` and `v` among them. RANK: axes of k."""

    RANK: ClassVar[int]
    k: jax.Array

    def extend(self, call: Call) -> tuple[jax.Array, Layer]:
        """Attention [b, h, g, t, k] of the new tokens to what is stored and to each other (no future ones), and the
        memory afterwards. A padded token changes nothing; its output is meaningless."""
        ...

    def full(self, length_b: jax.Array) -> jax.Array:
        """bool [b]: rows whose next single token might not fit."""
        ...

    def grow(self, more: int) -> Layer:
        """The same memory with room for at least `more` further tokens per row, and as small as that allows. Runs on
        the host; arrays may change their shapes."""
        ...

    def held(self, length_b: jax.Array) -> jax.Array:
        """i32 [b, h]: entries stored."""
        ...

    def read(self, length_b: jax.Array) -> jax.Array:
        """f32 [b, h]: entries that a query reads now (page statistics count as the entries they cost)."""
        ...


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies' configurations."""

    name: ClassVar[str] = ""

    def init(self, sizes: Sizes, capacity: int) -> Any:
        """The empty memory of all layers, stacked [layers, ...], to which a prompt of up to `capacity` tokens per row
        can be given in one call."""
        raise NotImplementedError

    def describe(self) -> str:
        """The policy in a line of `info`."""
        return self.name


def stack_layers(layer: Any, n: int) -> Any:
    """n copies of an empty layer, on a new leading axis."""
    return jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), layer)


def is_layer(node: Any) -> bool:
    """True for the state of a layer (or of stacked layers): the `is_leaf` of trees that hold some."""
    return hasattr(node, "extend")
