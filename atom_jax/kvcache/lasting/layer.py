"""The memory of a layer while a long text is read in parts: sinks, the part before, and what that receives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import observe
from atom_jax.kvcache.dense import put
from atom_jax.kvcache.layer import Call, Layer
from atom_jax.kvcache.window import WindowLayer
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens


@struct.dataclass
class PartLayer(Layer):
    """Keys (before RoPE) and values of one layer.

    sink_k, sink_v: [b, h, s, k], the text's first positions. before_k, before_v: [b, h, w, k], the part before. k, v:
    [b, h, w, k], the part that is being read; count: i32 [b], how much of it has been. most, total: f32 [b, h, w],
    attention that the part before received from this one, as in `score.Seen`; own_most, own_total: what this part's
    positions received from those after them in it.

    A part has w positions, which come in any number of calls; one that comes after a whole part begins the next.
    Places are given anew with every part: sinks first, then the part before, then the new one, which begins at 0 for
    a text's first part, at w for the next, with the sinks still in the part before, and at s + w for all others
    (`Call.length` less `count`). So they stay below s + 2 w, whatever was read. s is at most w. Sliding layers see
    nothing of the sinks.
    """

    sink_k: jax.Array
    sink_v: jax.Array
    before_k: jax.Array
    before_v: jax.Array
    k: jax.Array
    v: jax.Array
    count: jax.Array
    most: jax.Array
    total: jax.Array
    own_most: jax.Array
    own_total: jax.Array

    @classmethod
    def empty(cls, b: int, h: int, sinks: int, window: int, k: int, dtype: Any) -> PartLayer:
        """A layer that has read nothing."""
        sink, part = (jnp.zeros((b, h, n, k), dtype) for n in (sinks, window))
        none = jnp.zeros((b, h, window), jnp.float32)
        return cls(sink, sink, part, part, part, part, jnp.zeros(b, jnp.int32), none, none, none, none)

    def extend(self, call: Call) -> tuple[jax.Array, PartLayer]:
        """Attention to sinks, the part before and this one, and what is known then."""
        s, w = self.sink_k.shape[2], self.k.shape[2]
        part = self._turned(jnp.any(call.real, axis=1))
        start, offsets = (call.length - part.count)[:, None], jnp.arange(call.q.shape[3])[None]
        # Different places beyond the end, for the promise that no two are the same.
        at = jnp.where(call.real, part.count[:, None] + offsets, w + offsets)
        k, v = put(part.k, call.k_plain, at), put(part.v, call.v, at)
        count = part.count + jnp.sum(call.real, axis=1, dtype=jnp.int32)
        own = jnp.arange(w)[None]
        places = jnp.concatenate(
            [
                jnp.where((start > w) & (call.window is None), jnp.arange(s)[None], -1),
                jnp.where(start > 0, start - w + own, -1),
                jnp.where(own < count[:, None], start + own, -1),
            ],
            axis=1,
        )
        stored = jnp.concatenate([part.sink_k, part.before_k, k], axis=2)
        turned_k = turned(stored, jnp.maximum(places, 0), call.rotary, call.rope)
        stored_v = jnp.concatenate([part.sink_v, part.before_v, v], axis=2)
        out, most, total = self.attended(call, turned_k, stored_v, places)
        first = (start == 0)[..., None, None]
        cut = lambda x: (x[..., s : s + w], x[..., s + w :])  # noqa: E731
        (most, own_most), (total, own_total) = cut(most), cut(total)
        return out, part.replace(
            sink_k=jnp.where(first, k[:, :, :s], part.sink_k), sink_v=jnp.where(first, v[:, :, :s], part.sink_v),
            k=k, v=v, count=count, most=jnp.maximum(part.most, most), total=part.total + total,
            own_most=jnp.maximum(part.own_most, own_most), own_total=part.own_total + own_total,
        )  # fmt: skip

    def attended(
        self, call: Call, k_bhsk: jax.Array, v_bhsk: jax.Array, places_bs: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As of `observe.attend_observed`, of what is stored at these places."""
        return observe.attend_observed(
            call.q, call.tokens.positions, call.real, k_bhsk, v_bhsk, places_bs, call.window
        )

    def _turned(self, new_b: jax.Array) -> PartLayer:
        """The layer in which a whole part is the one before, in rows in which something comes after it."""
        over = new_b & (self.count >= self.k.shape[2])
        pick = lambda a, b: jnp.where(over.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        nothing = jnp.zeros_like(self.most)
        received = {name: pick(nothing, getattr(self, name)) for name in ("most", "total", "own_most", "own_total")}
        return self.replace(
            before_k=pick(self.k, self.before_k), before_v=pick(self.v, self.before_v),
            count=jnp.where(over, 0, self.count), **received,
        )  # fmt: skip


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


def moved(k_bhsk: jax.Array, by_bs: jax.Array, rotary: int, of: tuple) -> jax.Array:
    """Keys as RoPE has turned them, so many places, i32 [b, s] or [b, 1], further on."""
    if not rotary:
        return k_bhsk
    _, factor = rope.frequencies(rotary, *of)
    cos, sin = (x.swapaxes(1, 2) / factor for x in rope.tables(by_bs, rotary, *of))
    return rope.rotate(k_bhsk, cos, sin)
