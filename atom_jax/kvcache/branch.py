"""Futures that share what was stored before they parted; `layer.Layer` is the protocol that it follows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Call, Layer
from atom_jax.kvcache.memory import Memory
from atom_jax.nn.attention import NEGATIVE


@struct.dataclass
class Branch(Layer):
    """b n rows, of which every n, one beside the other, have a prefix in common.

    k, v: [b, h, c, k], the prefix of each group, which is never written, and count: i32 [b], its tokens.
    own: what every row has stored since, [b n, h, e, k], where slot e holds the token at position count + e.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array
    own: DenseLayer

    def extend(self, call: Call) -> tuple[jax.Array, Branch]:
        """Stores the new tokens, and attends to the prefix, to what is stored since and to each other."""
        groups, (rows, h, g, t, size) = self.k.shape[0], call.q.shape
        n = rows // groups
        before = call.length - jnp.repeat(self.count, n)
        own = self.own.write(call.k, call.v, before)
        q = call.q.reshape(groups, n, h, g, t, size)
        slots = lambda k: jnp.arange(k.shape[2])  # noqa: E731
        held = jnp.broadcast_to((slots(self.k)[None] < self.count[:, None])[:, None], (groups, n, self.k.shape[2]))
        # Positions of a row count from the end of its prefix here.
        since = before[:, None] + jnp.arange(t)[None]
        new = (slots(own.k)[None, None] <= since[:, :, None]).reshape(groups, n, 1, 1, t, -1)
        scores = [
            jnp.einsum("bnhgtk,bhsk->bnhgts", q, self.k, preferred_element_type=jnp.float32),
            jnp.einsum("bnhgtk,bnhsk->bnhgts", q, _grouped(own.k, n), preferred_element_type=jnp.float32),
        ]
        seen = [held[:, :, None, None, None], new]
        scores = [jnp.where(jnp.broadcast_to(m, s.shape), s * size**-0.5, NEGATIVE) for s, m in zip(scores, seen)]
        top = jnp.maximum(*(s.max(-1, keepdims=True) for s in scores))
        there, here = (jnp.exp(s - top) for s in scores)
        out = jnp.einsum(
            "bnhgts,bhsk->bnhgtk", there.astype(self.v.dtype), self.v, preferred_element_type=jnp.float32
        )
        own_v = _grouped(own.v, n)
        out += jnp.einsum("bnhgts,bnhsk->bnhgtk", here.astype(own_v.dtype), own_v, preferred_element_type=jnp.float32)
        out = out / (there.sum(-1, keepdims=True) + here.sum(-1, keepdims=True))
        return out.reshape(call.q.shape).astype(call.q.dtype), self.replace(own=own)

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """Rows whose next tokens do not fit."""
        before = length_b - jnp.repeat(self.count, len(length_b) // self.count.shape[0])
        return before + more > self.own.k.shape[-2]

    def grow(self, length_b: np.ndarray, more: int) -> Branch:
        """Room for `more` tokens after the longest row."""
        count = np.asarray(self.count).reshape(-1, self.count.shape[-1])[0]
        return self.replace(own=self.own.grow(length_b - count.repeat(len(length_b) // len(count)), more))

    def rows(self, index_b: jax.Array, axis: int = 0) -> Branch:
        """Rows [b m] of the same groups, each from its own: the prefixes stay where they are."""
        return self.replace(own=self.own.rows(index_b, axis))

    def held(self, length_b: jax.Array) -> jax.Array:
        """Every token."""
        return jnp.broadcast_to(length_b[:, None], self.own.k.shape[:2])


def _grouped(x: jax.Array, n: int) -> jax.Array:
    return x.reshape(x.shape[0] // n, n, *x.shape[1:])


def of(layer: Any, n: int, room: int, length_b: jax.Array, axis: int) -> Branch:
    """n futures of every row of a dense layer (axis 1: of several, stacked), with room for so many tokens each."""
    shape = list(layer.k.shape)
    shape[axis], shape[-2] = shape[axis] * n, room
    own = DenseLayer(*(jnp.zeros(shape, x.dtype) for x in (layer.k, layer.v)))
    count = jnp.broadcast_to(length_b, (*layer.k.shape[:axis], *length_b.shape))
    return Branch(layer.k, layer.v, count, own)


def fork(memory: Memory, n: int, room: int) -> Memory:
    """n futures of every row, one beside the other, with room for so many tokens each in dense layers, whose prefix
    they share; all else is copied, and small in a memory that fits (`memory.fit`)."""

    def one(layer: Layer, length_b: jax.Array, axis: int) -> Layer:
        if type(layer) is DenseLayer:
            return of(layer, n, room, length_b, axis)
        return layer.rows(jnp.repeat(jnp.arange(len(length_b), dtype=jnp.int32), n), axis)

    return memory_lib.fork(memory, n, one)
