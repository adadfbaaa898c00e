"""Attention to the newest positions, and to a fixed number of slots in which older ones are merged: running means of
keys that are alike, and of their values (CAMELoT, He et al., 2024).

Dimension letters besides those of `atom_jax.typing`: h heads, k their size, w newest positions, m slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree

# Newest positions and slots; the cosine from which on a key joins a slot; steps that are computed again together in
# the backward pass.
NEAR, SLOTS, ALIKE, CHUNK = 64, 64, 0.93, 64
THETA = 10000.0
# The age of a slot in which nothing is.
_NEVER = 2**30


@struct.dataclass
class SlotState:
    """What a layer remembers of each row.

    near_k, near_v: [b, h, w, k], keys before RoPE and values of the newest positions; p is at p mod w. k, v: f32
    [b, h, m, k], means of the slots; count: f32 [b, h, m], of how many each is (0: empty); age: i32 [b, h, m], writes
    since the last one to it.
    """

    near_k: jax.Array
    near_v: jax.Array
    k: jax.Array
    v: jax.Array
    count: jax.Array
    age: jax.Array

    @classmethod
    def empty(cls, b: int, heads: int, size: int, near: int, slots: int, dtype: Any) -> SlotState:
        """Before the first position."""
        newest, means = jnp.zeros((b, heads, near, size), dtype), jnp.zeros((b, heads, slots, size), jnp.float32)
        return cls(newest, newest, means, means, means[..., 0], jnp.full((b, heads, slots), _NEVER, jnp.int32))


def layer(
    p: Tree, x_btd: jax.Array, tokens: Tokens, state: SlotState | None, *, rotary: int, eps: float, near: int = NEAR,
    slots: int = SLOTS, alike: float = ALIKE,
) -> tuple[jax.Array, SlotState | None]:  # fmt: skip
    """Outputs [b, t, d] and the state with these positions (None for None), one position after another.

    At every position the one that is `near` before it leaves the newest ones, and is written to the slots: where its
    key's cosine with that of a slot, before RoPE, is larger than `alike`, it joins the nearest such slot (c becomes
    c + 1, means (c mean + new) / (c + 1)), else it takes the place of the slot that was written to longest ago, an
    empty one first. Then the query's softmax is over the newest positions, its own included, and those slots that are
    nearest to any of them by the same cosine; slots stand at the place before the newest positions. Slots are empty
    again where a document begins.

    Args:
      p: "qkv" [d, 3, h, k], "o" [h, k, d], perhaps "q_norm" and "k_norm" [k].
      tokens: where inputs stand; padding changes nothing. rotary: channels of queries and keys that RoPE turns.

    Differs from the paper, of which no code is public: there slots are added to models that are trained without, and
    parts of a text are read and written as a whole; here the layer is trained with its slots. Keys are merged before
    RoPE, since those of different places have no mean that says anything.
    """
    b, t, _ = x_btd.shape
    q, k, v = (a[:, :, 0] for a in jnp.split(project(x_btd, p["qkv"]), 3, axis=2))
    if "q_norm" in p:
        q, k = rms_norm(q, p["q_norm"], eps), rms_norm(k, p["k_norm"], eps)
    heads, size = k.shape[2:]
    at = jnp.broadcast_to(jnp.int32(near), (1, 1))
    q = rope.rotate(q, *rope.tables(at, rotary, THETA)) if rotary else q
    chunk = min(CHUNK, t)
    inputs = (q, k, v, tokens.positions, tokens.segments > 0)
    parts = tuple(jnp.moveaxis(in_blocks(x, 1, chunk), 2, 1) for x in inputs)

    def one(state: SlotState, part: tuple) -> tuple[SlotState, jax.Array]:
        q, k, v, place, real = part
        state = _written(state, k, v, place, real, alike)
        return state, _read(state, q, place, rotary)

    some = lambda state, part: jax.lax.scan(one, state, part)  # noqa: E731
    first = SlotState.empty(b, heads, size, near, slots, k.dtype) if state is None else state
    last, out = jax.lax.scan(some if state is not None else jax.checkpoint(some, prevent_cse=False), first, parts)
    out_bthk = jnp.moveaxis(out.reshape(-1, *out.shape[2:])[:t], 0, 1).astype(x_btd.dtype)
    return project(out_bthk, p["o"], inputs=2), None if state is None else last


def _written(
    state: SlotState, k_bhk: jax.Array, v_bhk: jax.Array, place_b: jax.Array, real_b: jax.Array, alike: float
) -> SlotState:
    """The state with a position: one leaves the newest, for the slots, and it takes its place."""
    near, slots = state.near_k.shape[2], state.k.shape[2]
    begins = (real_b & (place_b == 0))[:, None, None]
    count, age = jnp.where(begins, 0.0, state.count), jnp.where(begins, _NEVER, state.age)
    at = place_b % near
    old_k, old_v = (
        jnp.take_along_axis(x, at[:, None, None, None], axis=2).astype(jnp.float32)
        for x in (state.near_k, state.near_v)
    )
    cosine = jnp.where(count > 0, jnp.einsum("bhwk,bhmk->bhwm", _unit(old_k), _unit(state.k))[:, :, 0], -2.0)
    joins = cosine.max(-1, keepdims=True) > alike
    target = jnp.where(joins[..., 0], cosine.argmax(-1), age.argmax(-1))
    leaves = (real_b & (place_b >= near))[:, None, None]
    hit = leaves & (jnp.arange(slots)[None, None] == target[..., None])
    before = jnp.where(joins, count, 0.0)
    means = (
        jnp.where(hit[..., None], (before[..., None] * mean + new) / (before[..., None] + 1), mean)
        for mean, new in ((state.k, old_k), (state.v, old_v))
    )
    here = (real_b[:, None] & (jnp.arange(near)[None] == at[:, None]))[:, None, :, None]
    newest = (jnp.where(here, new[:, :, None], x) for x, new in ((state.near_k, k_bhk), (state.near_v, v_bhk)))
    # An age stops where nothing is older.
    age = jnp.minimum(jnp.where(hit, 0, age) + leaves, _NEVER)
    return SlotState(*newest, *means, jnp.where(hit, before + 1, count), age)


def _read(state: SlotState, q_bhk: jax.Array, place_b: jax.Array, rotary: int) -> jax.Array:
    """f32 [b, h, k], what the query finds, which RoPE has turned to the last of the places 0 (slots), 1, ..."""
    near, size = state.near_k.shape[2], q_bhk.shape[-1]
    back = (place_b[:, None] - jnp.arange(near)[None]) % near
    there = (back <= place_b[:, None])[:, None]
    keys = state.near_k
    if rotary:
        turned = rope.rotate(keys.transpose(0, 2, 1, 3), *rope.tables(near - back, rotary, THETA))
        keys = turned.transpose(0, 2, 1, 3)
    cosine = jnp.einsum("bhwk,bhmk->bhwm", _unit(state.near_k.astype(jnp.float32)), _unit(state.k))
    cosine = jnp.where((state.count > 0)[:, :, None], cosine, -2.0)
    nearest = jnp.arange(state.k.shape[2])[None, None, None] == cosine.argmax(-1)[..., None]
    chosen = (nearest & there[..., None]).any(2) & (state.count > 0)
    scores = [jnp.einsum("bhk,bhsk->bhs", q_bhk, x, preferred_element_type=jnp.float32) for x in (keys, state.k)]
    both = [jnp.where(seen, s * size**-0.5, NEGATIVE) for seen, s in zip((there, chosen), scores)]
    w_near, w_slots = jnp.split(jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1), [near], axis=-1)
    sums = (
        jnp.einsum("bhs,bhsk->bhk", w, x.astype(jnp.float32)) for w, x in ((w_near, state.near_v), (w_slots, state.v))
    )
    return sum(sums)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
