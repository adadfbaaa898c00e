"""Attention to blocks of what came before through their landmarks (Mohtashami & Jaggi, 2023).

A query's softmax is over the keys of its own block so far and the landmarks of all earlier blocks of its document;
what a landmark gets is spread over its block by a second softmax, of the block's keys alone. With few blocks chosen
by their landmarks, what is read of the others is one key each.

Dimension letters besides those of `atom_jax.typing`: h heads, k their size, m blocks, e positions of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree

# Positions of a block. Queries whose weights exist at once.
EVERY, ROWS = 64, 64
THETA = 10000.0


class Places(NamedTuple):
    """Where queries are. start, count: i32 [b, t], the slot in which the query's block begins (below 0: there are the
    slots from 0 on), and how many positions from there on it sees. seen: bool [b, t, m], the earlier blocks of its
    document."""

    start: jax.Array
    count: jax.Array
    seen: jax.Array


class Blocks(NamedTuple):
    """Whole blocks: keys and values [b, h, m, e, k], keys of their landmarks [b, h, m, k]."""

    k: jax.Array
    v: jax.Array
    mark: jax.Array


class Held(Protocol):
    """A memory whose slots hold the keys and values [b, h, s, k] of positions, and the landmarks of whole blocks."""

    k: jax.Array
    v: jax.Array
    mark: jax.Array

    def write(
        self, k_bhtk: jax.Array, v_bhtk: jax.Array, mark_bhtk: jax.Array, tokens: Tokens, length_b: jax.Array
    ) -> Any:
        """The memory with the real ones of t positions of every row added from slot length_b on."""


def layer(
    p: Tree, x_btd: jax.Array, tokens: Tokens, cache: Held | None, length_b: jax.Array | None, *, rotary: int,
    eps: float, every: int = EVERY, nearest: int = 0,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Outputs [b, t, d] and the memory with these positions (None for None).

    Args:
      p: "qkv" [d, 3, h, k], "o" [h, k, d], "mark" [d, h, k], perhaps "q_norm" and "k_norm" [k].
      tokens: where inputs stand; documents are whole runs of a row. With a cache positions are its slots, every row
        is one document, and padding comes last. length_b: i32 [b], positions that it holds before.
      rotary: channels of queries and keys that RoPE turns. every: positions of a block. nearest: so many blocks are
        read, those with the largest landmarks for the query and head; 0: all.

    Differs from the official code, where a landmark is a token of its own that is put behind every block of a text:
    here its key is a projection of what the last position of the block has become, which stays one that is read as
    others are, and has that position's place. There all blocks are read in training, and few (2 to 4) when serving,
    at places given anew; here `nearest` is the same for both, and places are those of the text.
    """
    q, k, v = (a[:, :, 0] for a in jnp.split(project(x_btd, p["qkv"]), 3, axis=2))
    mark = project(x_btd, p["mark"])
    if "q_norm" in p:
        q, k, mark = rms_norm(q, p["q_norm"], eps), rms_norm(k, p["k_norm"], eps), rms_norm(mark, p["k_norm"], eps)
    if rotary:
        table = rope.tables(tokens.positions, rotary, THETA)
        q, k, mark = (rope.rotate(a, *table) for a in (q, k, mark))
    q, k, v, mark = (a.transpose(0, 2, 1, 3) for a in (q, k, v, mark))
    if cache is None:
        blocks, places = in_rows(k, v, mark, tokens, every)
    else:
        cache = cache.write(k, v, mark, tokens, length_b)
        k, v, (b, h, m, size) = cache.k, cache.v, cache.mark.shape
        blocks = Blocks(*(a.reshape(b, h, m, every, size) for a in (k, v)), cache.mark)
        number, place = tokens.positions // every, tokens.positions % every
        places = Places(number * every, place + 1, jnp.arange(m)[None, None] < number[..., None])
    out = attend(q, k, v, blocks, places, nearest)
    return project(out.transpose(0, 2, 1, 3), p["o"], inputs=2), cache


def in_rows(
    k_bhtk: jax.Array, v_bhtk: jax.Array, mark_bhtk: jax.Array, tokens: Tokens, every: int
) -> tuple[Blocks, Places]:
    """The whole blocks of rows of documents, and where each position is a query."""
    t = k_bhtk.shape[2]
    slots, place = jnp.arange(t)[None], tokens.positions % every
    ends = (place == every - 1) & (tokens.segments > 0)
    end_bm = jnp.sort(jnp.where(ends, slots, t), axis=1)[:, : max(t // every, 1)]
    there = (end_bm < t) & (end_bm >= every - 1)
    end_bm, start = jnp.where(there, end_bm, t - 1), slots - place
    index = jnp.maximum(end_bm[..., None] - jnp.arange(every)[None, None, ::-1], 0)
    blocks = Blocks(_picked(k_bhtk, index), _picked(v_bhtk, index), _picked(mark_bhtk, end_bm))
    document = jnp.take_along_axis(tokens.segments, end_bm, axis=1)
    seen = there[:, None] & (document[:, None] == tokens.segments[..., None]) & (end_bm[:, None] < start[..., None])
    return blocks, Places(start, place + 1, seen)


def attend(
    q_bhtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, blocks: Blocks, places: Places, nearest: int = 0
) -> jax.Array:
    """The grouped softmax, [b, h, t, k] in the dtype of the queries; of few queries at a time, so that memory is
    linear in them. k_bhsk, v_bhsk: keys and values in their slots, for the queries' own blocks."""
    b, h, t, size = q_bhtk.shape

    def some(part: tuple) -> jax.Array:
        q, places = part
        return _attend(q, k_bhsk, v_bhsk, blocks, places, nearest)

    if t <= ROWS:
        return some((q_bhtk, places))
    parts = in_blocks(q_bhtk, 2, ROWS), Places(*(in_blocks(x, 1, ROWS) for x in places))
    out = jax.lax.map(jax.checkpoint(some, prevent_cse=False), parts)
    return jnp.moveaxis(out, 0, 2).reshape(b, h, -1, size)[:, :, :t]


def _attend(
    q_bhtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, blocks: Blocks, places: Places, nearest: int
) -> jax.Array:
    scores = lambda form, keys: (  # noqa: E731
        jnp.einsum(form, q_bhtk, keys, preferred_element_type=jnp.float32) * q_bhtk.shape[-1] ** -0.5
    )
    offsets = jnp.arange(blocks.k.shape[3])[None, None]
    slots = places.start[..., None] + offsets
    own_k, own_v = (_picked(x, jnp.maximum(slots, 0)) for x in (k_bhsk, v_bhsk))
    there = (slots >= 0) & (offsets < places.count[..., None])
    own = jnp.where(there[:, None], scores("bhtk,bhtek->bhte", own_k), NEGATIVE)
    gate = jnp.where(places.seen[:, None], scores("bhtk,bhmk->bhtm", blocks.mark), NEGATIVE)
    blocks, gate = _chosen(blocks, gate, nearest)
    top = jnp.maximum(own.max(-1, keepdims=True), gate.max(-1, keepdims=True))
    own, gate = jnp.exp(own - top), jnp.exp(gate - top)
    inside = jax.nn.softmax(scores("bhtk,bhmek->bhtme", blocks.k), axis=-1) * gate[..., None]
    sums = (("bhte,bhtek->bhtk", own, own_v), ("bhtme,bhmek->bhtk", inside, blocks.v))
    out = sum(jnp.einsum(f, w.astype(v.dtype), v, preferred_element_type=jnp.float32) for f, w, v in sums)
    total = own.sum(-1, keepdims=True) + gate.sum(-1, keepdims=True)
    return (out / total).astype(q_bhtk.dtype)


def _chosen(blocks: Blocks, gate_bhtm: jax.Array, nearest: int) -> tuple[Blocks, jax.Array]:
    """The blocks with the `nearest` largest landmarks: of a single query they are fetched, of several the others get
    nothing."""
    if not 0 < nearest < gate_bhtm.shape[-1]:
        return blocks, gate_bhtm
    best, index = jax.lax.top_k(gate_bhtm, nearest)
    if gate_bhtm.shape[2] > 1:
        return blocks, jnp.where(gate_bhtm >= best[..., -1:], gate_bhtm, NEGATIVE)
    pick = jax.vmap(jax.vmap(lambda x, i: x[i]))
    return Blocks(*(pick(x, index[:, :, 0]) for x in blocks)), best


def _picked(x_bhsk: jax.Array, index: jax.Array) -> jax.Array:
    """[b, h, ..., k] of slots i32 [b, ...]."""
    return jax.vmap(lambda x, i: x[:, i])(x_bhsk, index)
