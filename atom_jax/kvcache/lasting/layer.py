"""The memory of a layer while a long text is read in parts: sinks, the part before, and what that receives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import observe
from atom_jax.kvcache.memory import Call, Layer
from atom_jax.kvcache.window import WindowLayer
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens


@struct.dataclass
class PartLayer(Layer):
    """Keys (before RoPE) and values of one layer.

    sink_k, sink_v: [b, h, s, k], the text's first tokens. k, v: [b, h, w, k], the part before. most, total: f32
    [b, h, n], attention that the part before that one received from the latest one, as in `score.Seen`; own_most,
    own_total: f32 [b, h, w], what the latest part's tokens received from those after them in it.

    Places are given anew with every part: sinks first, then the part before, then the new one, which begins at
    `Call.length`: 0 for a text's first part, w for the next, with the sinks still in the part before, and s + w for
    all others. So they stay below s + 2 w, whatever was read. A part has at least s tokens, padding included. Sliding
    layers see nothing of the sinks.
    """

    sink_k: jax.Array
    sink_v: jax.Array
    k: jax.Array
    v: jax.Array
    most: jax.Array
    total: jax.Array
    own_most: jax.Array
    own_total: jax.Array

    @classmethod
    def empty(cls, b: int, h: int, sinks: int, window: int, k: int, dtype: Any) -> PartLayer:
        """A layer that has read nothing."""
        sink, part = (jnp.zeros((b, h, n, k), dtype) for n in (sinks, window))
        none = jnp.zeros((b, h, window), jnp.float32)
        return cls(sink, sink, part, part, none, none, none, none)

    def extend(self, call: Call) -> tuple[jax.Array, PartLayer]:
        """Attention to sinks, the part before and this one, and this one in the place of that."""
        s, w = self.sink_k.shape[2], self.k.shape[2]
        at = call.length[:, None]
        sinks = (at > w) & (call.window is None)
        places = jnp.concatenate(
            [
                jnp.where(sinks, jnp.arange(s)[None], -1),
                jnp.where(at > 0, at - w + jnp.arange(w)[None], -1),
                jnp.where(call.real, call.tokens.positions, -1),
            ],
            axis=1,
        )
        stored = jnp.concatenate([self.sink_k, self.k], axis=2)
        before = turned(stored, jnp.maximum(places[:, : s + w], 0), call.rotary, call.rope)
        k = jnp.concatenate([before, call.k], axis=2)
        v = jnp.concatenate([self.sink_v, self.v, call.v], axis=2)
        out, most, total = observe.attend_observed(
            call.q, call.tokens.positions, call.real, k, v, places, call.window
        )
        first = (call.length == 0)[:, None, None, None]
        sink_k = jnp.where(first, call.k_plain[:, :, :s], self.sink_k)
        sink_v = jnp.where(first, call.v[:, :, :s], self.sink_v)
        cut = lambda x: (x[..., s : s + w], x[..., s + w :])  # noqa: E731
        (most, own_most), (total, own_total) = cut(most), cut(total)
        return out, PartLayer(sink_k, sink_v, call.k_plain, call.v, most, total, own_most, own_total)


@struct.dataclass
class LateWindow(WindowLayer):
    """The ring of a sliding layer that has seen nothing before position `first`, i32 [b]."""

    first: jax.Array = None

    def _held(self, length_b: jax.Array) -> Tokens:
        newest = self._newest(length_b)
        return Tokens(newest, (newest >= self.first[:, None]).astype(jnp.int32))

    def held(self, length_b: jax.Array) -> jax.Array:
        """The latest tokens."""
        held_b = jnp.minimum(length_b - self.first, self.window)
        return jnp.broadcast_to(held_b[:, None], self.k.shape[:2])


def turned(k_bhsk: jax.Array, places_bs: jax.Array, rotary: int, of: tuple) -> jax.Array:
    """Keys before RoPE as they are at these places, i32 [b, s]. rotary, of: as `Call.rotary` and `Call.rope`."""
    if not rotary:
        return k_bhsk
    cos, sin = rope.tables(places_bs, rotary, *of)
    return rope.rotate(k_bhsk, cos.swapaxes(1, 2), sin.swapaxes(1, 2))
