"""Attention to the newest positions, and to those few of many older ones whose keys are nearest to the query: a
memory that is searched (Memorizing Transformers, Wu et al., 2022, section 3).

Dimension letters besides those of `atom_jax.typing`: h heads, k their size, n neighbours.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens, attend
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.nn.self_attention import self_attend
from atom_jax.params import ParamSpec, zeros

# Newest positions, older ones that the memory holds, and those of them that a query reads; queries whose scores exist
# at once.
NEAR, SIZE, NEAREST, ROWS = 512, 8192, 32, 64
THETA = 10000.0


class Keys(NamedTuple):
    """Keys before RoPE and values [b, h, s, k], and one over the norms of these keys, f32 [b, h, s]."""

    k: jax.Array
    v: jax.Array
    inverse: jax.Array


class Held(Protocol):
    """A memory of the newest `near + size` positions of every row, and perhaps older ones."""

    def keys(self, length_b: jax.Array) -> tuple[Keys, Tokens]:
        """All that rows of so many positions hold, in any order, and where it stands."""

    def latest(self, count: int, length_b: jax.Array) -> tuple[Keys, Tokens]:
        """The last `count` before position length_b, in order; of segment 0 are those before the first."""

    def write(self, new: Keys, tokens: Tokens, length_b: jax.Array) -> Any:
        """The memory with the real ones of t positions of every row added from length_b on."""


def layer_spec(heads: int) -> dict[str, ParamSpec]:
    """Parameters of `layer` besides those of attention."""
    return {name: ParamSpec((heads,), ("heads",), zeros) for name in ("gate", "logit_scale")}


def layer(
    p: dict[str, Any], x_btd: jax.Array, tokens: Tokens, cache: Held | None, length_b: jax.Array | None, *,
    rotary: int, eps: float, near: int = NEAR, size: int = SIZE, nearest: int = NEAREST, fresh: bool = False,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Outputs [b, t, d] in the dtype of x, and the memory with these positions (None for None).

    Of every head (1 - g) local + g memory, with g = sigmoid(gate). Local is causal attention to the newest `near`
    positions, the query's own included. A key and its value enter the memory when they leave these, `near` positions
    later, and leave it `size` positions after that, so that no query finds what it sees anyhow, and numbers do not
    depend on how a text is cut into calls. Memory is a softmax over the `nearest` of its keys with the largest cosine
    to the query, all of them where it has fewer, without positions, of cosines times sqrt(k) exp(logit_scale). Where
    it is empty the output is local alone, and g does not count. Documents begin with an empty memory. No gradient
    goes into the memory's keys, its values or the choice among them; the query gets one, as do gate and logit_scale.

    Args:
      p: "qkv" [d, 3, h, k], "o" [h, k, d], "gate" and "logit_scale" [h], perhaps "q_norm" and "k_norm" [k].
      tokens: where inputs stand; documents are whole runs of a row. With a cache positions are its own, every row is
        one document, and padding comes last. length_b: i32 [b], positions that it holds before.
      rotary: channels of local queries and keys that RoPE turns. fresh: nothing is stored yet; static.

    Scores of all keys exist for 64 queries at a time; cosines are of float32 sums of products in the dtype of x.

    Differs from the official code, where a whole part of a text (512 tokens) is searched for before it is stored, so
    that what a query finds depends on its place in the part; where neighbours are the best of each of as many strided
    parts of the memory, and a key that sums to 0 is an empty place; and where rows share a memory by default. There
    local attention has normalised keys too, with the same factor, which begins as 1; here it is as in other layers,
    and the factor begins as sqrt(k). Its memory lasts over the training steps that read a document, in training here
    it goes back to the beginning of the row. Defaults are its 512 newest and 8,192 older positions, of which it reads
    128 neighbours, and this one 32.
    """
    q, k, v = (a[:, :, 0] for a in jnp.split(project(x_btd, p["qkv"]), 3, axis=2))
    if "q_norm" in p:
        q, k = rms_norm(q, p["q_norm"], eps), rms_norm(k, p["k_norm"], eps)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    new, turned = Keys(k, v, _inverse(k)), functools.partial(_turned, rotary=rotary)
    alone = cache is None or fresh
    if alone:
        here = there = tokens
        local = self_attend(turned(q, here)[:, :, None], turned(k, here), v, here, window=near)
        held = new if k.shape[2] > near else None
    else:
        here = Tokens(tokens.positions, jnp.ones_like(tokens.segments))
        last, at = _joined(cache.latest(near - 1, length_b), (new, tokens))
        local = attend(turned(q, here)[:, :, None], turned(last.k, at), last.v, here, at, window=near)
        held, there = cache.keys(length_b)
        if k.shape[2] > near:
            held, there = _joined((held, there), (new, tokens))
    out = local[:, :, 0]
    if held is not None:
        scale_h = jnp.exp(p["logit_scale"].astype(jnp.float32)) * k.shape[-1] ** 0.5
        found, some = recall(
            q, _inverse(q) * scale_h[None, :, None], held, here, there, near=near, size=size, nearest=nearest,
            aligned=alone,
        )  # fmt: skip
        gate_h = jax.nn.sigmoid(p["gate"].astype(jnp.float32))
        g = jnp.where(some[:, None], gate_h[None, :, None], 0.0)[..., None]
        out = ((1 - g) * out.astype(jnp.float32) + g * found).astype(x_btd.dtype)
    after = None if cache is None else cache.write(new, tokens, length_b)
    return project(out.transpose(0, 2, 1, 3), p["o"], inputs=2), after


def recall(
    q_bhtk: jax.Array, sharp_bht: jax.Array, held: Keys, here: Tokens, there: Tokens, *, near: int, size: int,
    nearest: int, aligned: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What queries find among the keys that stand from `near` to less than `near + size` places before them in their
    document: f32 [b, h, t, k], and whether there is any, bool [b, t], without which the former means nothing.

    Args:
      sharp_bht: f32, factors of scores besides the keys' norms: one over the queries', times what the cosine is to
        be multiplied by. here, there: where queries and keys stand. aligned: True promises that key i stands where
        query i stands.
    Memory is linear in t and s for long inputs, forward and backward. Nothing is differentiated by `held`.
    """
    b, h, t, k = q_bhtk.shape
    held = jax.lax.stop_gradient(held)
    s = held.k.shape[2]
    span = min(s, size + ROWS - 1) if aligned else s

    def some(part: tuple) -> tuple[jax.Array, jax.Array]:
        q, sharp, here, first = part
        cut = lambda x, axis: x if span == s else jax.lax.dynamic_slice_in_dim(x, first, span, axis)  # noqa: E731
        keys, places = Keys(*(cut(x, 2) for x in held)), jax.tree.map(lambda x: cut(x, 1), there)
        back = here.positions[:, :, None] - places.positions[:, None]
        seen = (here.segments[:, :, None] == places.segments[:, None]) & (back >= near) & (back < near + size)
        return _recall(q, sharp, keys, seen, nearest), seen.any(-1)

    if t <= ROWS:
        return some((q_bhtk, sharp_bht, here, 0))
    firsts = jnp.clip(jnp.arange(-(-t // ROWS)) * ROWS - (near + size - 1), 0, s - span)
    parts = in_blocks(q_bhtk, 2, ROWS), in_blocks(sharp_bht, 2, ROWS), _tokens_in_blocks(here), firsts
    out, found = jax.lax.map(jax.checkpoint(some, prevent_cse=False), parts)
    return jnp.moveaxis(out, 0, 2).reshape(b, h, -1, k)[:, :, :t], jnp.moveaxis(found, 0, 1).reshape(b, -1)[:, :t]


def _recall(q_bhtk: jax.Array, sharp_bht: jax.Array, keys: Keys, seen_bts: jax.Array, nearest: int) -> jax.Array:
    products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = products("bhtk,bhsk->bhts", jax.lax.stop_gradient(q_bhtk), keys.k) * keys.inverse[:, :, None]
    scores = jnp.where(seen_bts[:, None], scores, NEGATIVE)
    best, index = jax.lax.top_k(scores, min(nearest, scores.shape[-1]))
    k, v, inverse = (jax.vmap(jax.vmap(lambda x, i: x[i]))(x, index) for x in keys)
    scores = products("bhtk,bhtnk->bhtn", q_bhtk, k) * inverse * sharp_bht[..., None]
    weights = jax.nn.softmax(jnp.where(best > NEGATIVE / 2, scores, NEGATIVE), axis=-1)
    return products("bhtn,bhtnk->bhtk", weights.astype(v.dtype), v)


def _tokens_in_blocks(tokens: Tokens) -> Tokens:
    return jax.tree.map(lambda x: in_blocks(x, 1, ROWS), tokens)


def _joined(one: tuple[Keys, Tokens], other: tuple[Keys, Tokens]) -> tuple[Keys, Tokens]:
    """Keys behind others, in the dtypes of these; real ones are all of segment 1."""
    join = lambda axis: lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=axis)  # noqa: E731
    keys = Keys(*map(join(2), one[0], other[0]))
    real = Tokens(other[1].positions, (other[1].segments > 0).astype(jnp.int32))
    return keys, jax.tree.map(join(1), one[1], real)


def _turned(x_bhtk: jax.Array, tokens: Tokens, rotary: int) -> jax.Array:
    """Queries or keys as RoPE turns them at their places."""
    if not rotary:
        return x_bhtk
    cos, sin = rope.tables(tokens.positions, rotary, THETA)
    return rope.rotate(x_bhtk, cos.swapaxes(1, 2), sin.swapaxes(1, 2))


def _inverse(x_bhtk: jax.Array) -> jax.Array:
    """One over the norms, f32 [b, h, t]."""
    return jax.lax.rsqrt(jnp.sum(jnp.square(x_bhtk.astype(jnp.float32)), axis=-1) + 1e-12)
