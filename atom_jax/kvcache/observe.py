"""Attention to stored entries, whose positions differ from head to head, and what these entries receive of it.

pos: i32 [b, h, s], positions of the entries, -1 where there is none. bias: f32 [b, h, s], added to the scores of the
entries (the logarithm of how many tokens each stands for), or None. window: of a sliding layer, whose queries see the
entries fewer than so many positions back, or None.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atom_jax.kvcache.layer import Call
from atom_jax.nn.attention import NEGATIVE, Tokens, attend, block_size
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.blockwise import blockwise_lse

# Queries whose weights on all entries exist at once in `received`.
ROWS = 64


def attend_entries(
    q_bhgtk: jax.Array, q: Tokens, k_bhsk: jax.Array, v_bhsk: jax.Array, pos_bhs: jax.Array,
    bias_bhs: jax.Array | None = None, window: int | None = None,
) -> jax.Array:  # fmt: skip
    """Attention [b, h, g, t, k] of new tokens to the entries that are not after them."""
    h = k_bhsk.shape[1]
    bias = None if bias_bhs is None else _fold(bias_bhs)
    # A window of -1: the bias is for all queries.
    options = {"window": window, "keep_bhs": bias, "keep_window": -1}
    out = attend(_fold(q_bhgtk), _fold(k_bhsk), _fold(v_bhsk), _queries(q, h), _entries(pos_bhs), **options)
    return out.reshape(q_bhgtk.shape)


def attend_one(
    q_bhgk: jax.Array, k_bhck: jax.Array, v_bhck: jax.Array, seen_bhc: jax.Array, bias_bhc: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention [b, h, g, k] of one token per row to the entries `seen`, bool [b, h, c], and its weights float32
    [b, h, g, c]."""
    scores = jnp.einsum("bhgk,bhck->bhgc", q_bhgk, k_bhck, preferred_element_type=jnp.float32)
    scores = _biased(scores * q_bhgk.shape[-1] ** -0.5, bias_bhc, 2)
    scores = jnp.where(jnp.broadcast_to(seen_bhc[:, :, None], scores.shape), scores, NEGATIVE)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhgc,bhck->bhgk", weights.astype(v_bhck.dtype), v_bhck, preferred_element_type=jnp.float32)
    return (out / total).astype(q_bhgk.dtype), weights / total


def attend_each(q_bhgk: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Attention [b, h, g, k] of one token per row to entries that lie in several arrays, (keys [b, h, s, k], values,
    seen bool [b, h or 1, s]) each, as if they lay in one, without moving them there."""
    scores = [
        jnp.einsum("bhgk,bhsk->bhgs", q_bhgk, k, preferred_element_type=jnp.float32) * q_bhgk.shape[-1] ** -0.5
        for k, _, _ in parts
    ]
    scores = [jnp.where(seen[:, :, None], part, NEGATIVE) for part, (_, _, seen) in zip(scores, parts)]
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in scores])
    weights = [jnp.exp(part - top) for part in scores]
    out = sum(
        jnp.einsum("bhgs,bhsk->bhgk", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts)
    )
    return (out / sum(w.sum(-1, keepdims=True) for w in weights)).astype(q_bhgk.dtype)


def last_queries(call: Call, n: int) -> tuple[jax.Array, jax.Array]:
    """The last n real queries of every row, [b, h, g, n, k], and their positions i32 [b, n], -1 where a row has
    fewer."""
    count_b = jnp.sum(call.real, axis=1, dtype=jnp.int32)
    at = count_b[:, None] - n + jnp.arange(n)[None]
    index = jnp.maximum(at, 0)
    q = jnp.take_along_axis(call.q, index[:, None, None, :, None], axis=3)
    return q, jnp.where(at >= 0, jnp.take_along_axis(call.tokens.positions, index, axis=1), -1)


def weights(
    q_bhgtk: jax.Array, at_bt: jax.Array, k_bhsk: jax.Array, pos_bhs: jax.Array,
    bias_bhs: jax.Array | None = None, window: int | None = None,
) -> jax.Array:  # fmt: skip
    """Attention weights float32 [b, h, g, t, s] of a few queries at positions at_bt; 0 for queries at -1."""
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q_bhgtk, k_bhsk, preferred_element_type=jnp.float32)
    distance, held = at_bt[:, None, :, None] - pos_bhs[:, :, None, :], (pos_bhs >= 0)[:, :, None]
    seen = held & (distance >= 0)
    seen = seen if window is None else seen & (distance < window)
    seen = jnp.broadcast_to(seen[:, :, None], scores.shape)
    scores = _biased(scores * q_bhgtk.shape[-1] ** -0.5, bias_bhs, 2, 3)
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, NEGATIVE), axis=-1), 0.0)


def received(
    q_bhgtk: jax.Array, q: Tokens, k_bhsk: jax.Array, pos_bhs: jax.Array, aligned: bool,
    bias_bhs: jax.Array | None = None, window: int | None = None, most: bool = False, after: int = 0,
    within: int | None = None,
) -> jax.Array:  # fmt: skip
    """Attention that every entry receives from all real queries together: float32 [b, h, g, s]; most: the largest
    weight instead of the sum. after, within: queries fewer than `after` positions behind it, and those that are not
    fewer than `within` behind it, do not count.

    Memory grows with t + s, not with their product: the first pass finds the log-sum-exp of every query, the second
    adds up the weights of ROWS queries at a time. aligned: as in `attend`; without bias only.
    """
    b, h, g, t, size = q_bhgtk.shape
    s, n = k_bhsk.shape[2], b * h
    queries, entries = _queries(q, h), _entries(pos_bhs)
    places = (queries.positions, queries.segments, entries.positions, entries.segments)
    keys, bias = _fold(k_bhsk), None if bias_bhs is None else _fold(bias_bhs)
    _, lse = blockwise_lse(
        _fold(q_bhgtk), keys, keys, places, window, aligned, block_size(s), bias, 0 if bias is None else -1
    )

    def add(total: jax.Array, block: tuple) -> tuple[jax.Array, None]:
        q, lse, at, real = block
        scores = jnp.einsum("ngtk,nsk->ngts", q, keys[:, 0], preferred_element_type=jnp.float32) * size**-0.5
        scores = _biased(scores, None if bias is None else bias[:, 0], 1, 2)
        distance = at[:, :, None] - entries.positions[:, None]
        seen = (entries.segments[:, None] > 0) & (distance >= 0) & (real[:, :, None] > 0)
        seen = seen if window is None else seen & (distance < window)
        seen = seen & (distance >= after) & (True if within is None else distance < within)
        weight = jnp.exp(jnp.where(jnp.broadcast_to(seen[:, None], scores.shape), scores - lse[..., None], NEGATIVE))
        return jnp.maximum(total, weight.max(2)) if most else total + weight.sum(2), None

    parts = (q_bhgtk.reshape(n, g, t, size), lse[:, 0]), (queries.positions, queries.segments)
    inputs = (*(in_blocks(x, 2, ROWS) for x in parts[0]), *(in_blocks(x, 1, ROWS) for x in parts[1]))
    total, _ = jax.lax.scan(add, jnp.zeros((n, g, s), jnp.float32), inputs)
    return total.reshape(b, h, g, s)


def attend_observed(
    q_bhgtk: jax.Array, at_bt: jax.Array, real_bt: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, pos_bs: jax.Array,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Attention [b, h, g, t, k] of queries at positions at_bt to entries at pos_bs (-1: none there), and what these
    receive of the real queries after them, float32 [b, h, s]: the largest weight of any query head, and the sum of
    all weights.

    The weights of ROWS queries exist at once. Keys behind all that a block of queries sees are left out, by quarters
    of t.
    """
    b, h, g, t, size = q_bhgtk.shape
    s, step = k_bhsk.shape[2], t // 4
    sizes = [s - 3 * step, s - 2 * step, s - step, s] if ROWS <= step < s // 4 else [s]

    def over(n: int, q: jax.Array, at: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of the first n keys."""
        pos = pos_bs[:, None, :n]
        distance = at[:, :, None] - pos
        held = pos >= 0 if window is None else (pos >= 0) & (distance < window)
        each = lambda x_brs: jnp.tile(x_brs, (1, g, 1))[:, None]  # noqa: E731
        scores = jnp.einsum("bhrk,bhsk->bhrs", q, k_bhsk[:, :, :n], preferred_element_type=jnp.float32) * size**-0.5
        scores = jnp.where(each(held & (distance >= 0)), scores, NEGATIVE)
        weight = jnp.exp(scores - scores.max(-1, keepdims=True))
        part = 1 / weight.sum(-1, keepdims=True)
        v = v_bhsk[:, :, :n]
        out = jnp.einsum("bhrs,bhsk->bhrk", weight.astype(v.dtype), v, preferred_element_type=jnp.float32) * part
        later = jnp.where(each(held & (distance > 0) & real[:, :, None]), weight * part, 0.0)
        most, total = (jnp.pad(x, [(0, 0), (0, 0), (0, s - n)]) for x in (later.max(2), later.sum(2)))
        return out, most, total

    def some(received: tuple, block: tuple) -> tuple[tuple, jax.Array]:
        q, at, real = block
        rows = q.reshape(b, h, -1, size), at, real
        last = (pos_bs >= 0) & (pos_bs <= at.max(1, keepdims=True))
        need = jnp.max(jnp.where(last, jnp.arange(1, s + 1)[None], 0))
        which = jnp.sum(need > jnp.array(sizes[:-1], jnp.int32))
        out, most, total = jax.lax.switch(which, [functools.partial(over, n) for n in sizes], *rows)
        out = out.reshape(b, h, g, -1, size).astype(q.dtype)
        return (jnp.maximum(received[0], most), received[1] + total), out

    none = jnp.zeros((b, h, s), jnp.float32)
    inputs = in_blocks(q_bhgtk, 3, ROWS), in_blocks(at_bt, 1, ROWS), in_blocks(real_bt, 1, ROWS)
    (most, total), out = jax.lax.scan(some, (none, none), inputs)
    out = jnp.moveaxis(out, 0, 3).reshape(b, h, g, -1, size)
    return out[..., :t, :], most, total


def _biased(scores: jax.Array, bias: jax.Array | None, *axes: int) -> jax.Array:
    """Scores with the entries' bias added, which lacks these axes."""
    if bias is None:
        return scores
    return scores + jnp.broadcast_to(jnp.expand_dims(bias, axes), scores.shape)


def _fold(x: jax.Array) -> jax.Array:
    """Heads as rows: [b, h, ...] to [b * h, 1, ...]."""
    return x.reshape(-1, 1, *x.shape[2:])


def _queries(q: Tokens, h: int) -> Tokens:
    return Tokens(*(jnp.repeat(x, h, axis=0) for x in (q.positions, (q.segments > 0).astype(jnp.int32))))


def _entries(pos_bhs: jax.Array) -> Tokens:
    pos = pos_bhs.reshape(-1, pos_bhs.shape[-1])
    return Tokens(pos, jnp.where(pos >= 0, 1, -1))
