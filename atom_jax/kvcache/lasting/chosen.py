"""The memory of a layer that leans on more than it attends to: pages of old entries are chosen by what is asked."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.dense import bucket, put, widen
from atom_jax.kvcache.lasting.layer import turned
from atom_jax.kvcache.lasting.score import middle
from atom_jax.kvcache.layer import Call, Layer
from atom_jax.kvcache.memory import Memory, layers, map_layers
from atom_jax.kvcache.policy import Policy
from atom_jax.kvcache.rows import put_rows
from atom_jax.nn import rope
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blocks import in_blocks

# Queries whose weights on all entries exist at once.
ROWS = 64


@dataclasses.dataclass(frozen=True)
class Choice(Policy):
    """How pages are chosen: for every layer and key/value head those in which a query's softmax over all entries
    (keys and queries before RoPE) has its largest weights. Before a first prompt is read all layers and heads
    agree (`wanting`) on those that they want most together: a fact needs its tokens everywhere at once. Later turns
    and strides choose in every layer and head by themselves.

    whole: so many entries are all attended to, and nothing is chosen. pages: how many are attended to otherwise, of
    `page` neighbouring entries each. stride: single tokens after which they are chosen anew, by the latest `queries`
    of these. Where nothing has been chosen yet (tokens of a prompt may make no unit) the first one chooses at once.
    successors: a page is wanted as much as the one before it, where that is more.
    resident: entries of more bytes than this stay on disk, and pages are chosen by their mean keys (`FetchedLayer`).
    gated: rows lean on entries where these make their prompts likelier, else on what was read last or on nothing
    (`lasting.gate`); every prompt is read three times more for that (five with passages). Otherwise all rows do.

    Several tokens in one call (a prompt) choose together, before any of them attends.
    """

    name: ClassVar[str] = "choice"
    stepwise: ClassVar[bool] = True
    whole: int = 2048
    pages: int = 16
    page: int = 32
    stride: int = 16
    queries: int = 8
    successors: bool = True
    resident: float = 2.0**30
    gated: bool = True

    def __post_init__(self):
        sizes = dict.fromkeys(("pages", "page", "stride", "queries"), (1, 2**16))
        config.check(self, whole=(0, 2**30), resident=(0, 2**50), **sizes)


@struct.dataclass
class ChosenLayer(Layer):
    """The memory of one layer.

    mem_k, mem_v: [1, h, s, k], entries with keys before RoPE, whole pages; count: i32 [1], how many are there.
    near_k, near_v: [b, h, n, k], what is always attended to, at near_pos i32 [b, n] (-1: nothing there). page_k,
    page_v: [b, h, p, k], the chosen pages, at page_pos i32 [b, h, p]; first: i32 [b], the first place of pages.
    told: f32 [b, pages], how much the latest several tokens wanted each page, averaged over heads. wanted: f32 [b,
    pages], by which the next several tokens choose in place of that; -1: by themselves.
    k, v: [b, h, c, k], tokens since, at places from `start`, i32 [b], on. recent: [b, h, g, queries, k], the latest
    queries before RoPE that have come one by one, in a ring; since: i32 [b], how many since the last choice. leans:
    bool [b], rows that attend to pages at all. policy: static.
    """

    mem_k: jax.Array
    mem_v: jax.Array
    count: jax.Array
    near_k: jax.Array
    near_v: jax.Array
    near_pos: jax.Array
    page_k: jax.Array
    page_v: jax.Array
    page_pos: jax.Array
    first: jax.Array
    k: jax.Array
    v: jax.Array
    start: jax.Array
    recent: jax.Array
    since: jax.Array
    leans: jax.Array
    told: jax.Array
    wanted: jax.Array
    policy: Choice = struct.field(pytree_node=False, default=None)

    free: ClassVar[dict[str, float]] = {"near_pos": -1, "page_pos": -1}
    # Arrays that all rows share.
    shared: ClassVar[tuple[str, ...]] = ("mem_k", "mem_v", "count")

    def extend(self, call: Call) -> tuple[jax.Array, ChosenLayer]:
        """Stores the new tokens, and attends to them, to what is near and to the pages."""
        at = call.length - self.start
        if call.q.shape[3] > 1:
            # A call may have nothing for a row where its tokens have made no unit yet.
            real = call.real & self.leans[:, None]
            layer = self._renewed(_before_rope(call), real, call)
            done = jnp.any(real, axis=1)[:, None]
            return layer.replace(wanted=jnp.where(done, -1.0, self.wanted))._attend(call, at)
        layer = self._stored(call, at)._due(call)
        size = layer.recent.shape[3]
        slot = jnp.where(call.real[:, 0], layer.since % size, size)
        rows = jnp.arange(len(slot))
        recent = layer.recent.at[rows, :, :, slot].set(_before_rope(call)[..., 0, :], mode="drop")
        return layer._attend_one(call), layer.replace(recent=recent, since=layer.since + call.real[:, 0])

    def _due(self, call: Call) -> ChosenLayer:
        """New pages for rows that go on and have waited for them. Before a token attends, and not after the one
        before it: so nothing else reads the pages that are replaced, which then happens where they lie."""
        none = self.page_pos[:, 0, 0] < 0
        due = call.real[:, 0] & self.leans & ((self.since >= self.policy.stride) | (none & (self.since > 0)))
        real = due[:, None] & (jnp.arange(self.recent.shape[3])[None] < self.since[:, None])

        def pages(layer: ChosenLayer) -> dict[str, jax.Array]:
            return {name: getattr(layer, name) for name in ("page_k", "page_v", "page_pos", "since")}

        # Without what never changes, which would be copied in every step.
        renew = lambda old: pages(self.replace(**old)._renewed(self.recent, real, call))  # noqa: E731
        return self.replace(**jax.lax.cond(jnp.any(due), renew, lambda old: old, pages(self)))

    def _renewed(self, plain_bhgtk: jax.Array, real_bt: jax.Array, call: Call) -> ChosenLayer:
        """New pages for the rows that have real queries."""
        new, due = self._choose(plain_bhgtk, real_bt, call), jnp.any(real_bt, axis=1)
        which = due[:, None, None]
        return self.replace(
            told=jnp.where(which[..., 0], new.told, self.told),
            page_k=jnp.where(which[..., None], new.page_k, self.page_k),
            page_v=jnp.where(which[..., None], new.page_v, self.page_v),
            page_pos=jnp.where(which, new.page_pos, self.page_pos),
            since=jnp.where(due, 0, self.since),
        )

    def _stored(self, call: Call, at_b: jax.Array) -> ChosenLayer:
        c, offsets = self.k.shape[2], jnp.arange(call.q.shape[3])[None]
        # Different places beyond the end, for the promise that no two are the same.
        slots = jnp.where(call.real, at_b[:, None] + offsets, c + offsets)
        return self.replace(k=put(self.k, call.k, slots), v=put(self.v, call.v, slots))

    def _attend_one(self, call: Call) -> jax.Array:
        """Attention of one token per row, whose own key is stored: nothing is after it."""
        own = jnp.arange(self.k.shape[2])[None] < (call.after - self.start)[:, None]
        seen = (self.near_pos >= 0)[:, None], self.page_pos >= 0, own[:, None]
        stored = (self.near_k, self.near_v), (self.page_k, self.page_v), (self.k, self.v)
        parts = [(*kv, there) for kv, there in zip(stored, seen)]
        return observe.attend_each(call.q[..., 0, :], parts)[..., None, :]

    def _attend(self, call: Call, at_b: jax.Array) -> tuple[jax.Array, ChosenLayer]:
        b, h, c, _ = self.k.shape
        layer = self._stored(call, at_b)
        held = jnp.arange(c)[None] < (call.after - self.start)[:, None]
        own = jnp.where(held, self.start[:, None] + jnp.arange(c)[None], -1)
        every = lambda x: jnp.broadcast_to(x[:, None], (b, h, x.shape[1]))  # noqa: E731
        pos = jnp.concatenate([every(self.near_pos), self.page_pos, every(own)], axis=2)
        k, v = (
            jnp.concatenate([near, page.astype(near.dtype), own], axis=2)
            for near, page, own in ((self.near_k, self.page_k, layer.k), (self.near_v, self.page_v, layer.v))
        )
        here = Tokens(call.tokens.positions, jnp.ones_like(call.tokens.segments))
        return observe.attend_entries(call.q, here, k, v, pos), layer

    def _choose(self, plain_bhgtk: jax.Array, real_bt: jax.Array, call: Call) -> ChosenLayer:
        """The layer with the pages that these queries want most."""
        size, sizes = self.policy.page, self._sizes()
        own = lambda: self._demand(plain_bhgtk, real_bt)  # noqa: E731
        wanted = jnp.broadcast_to(self.wanted[:, None], (len(self.wanted), self.k.shape[1], len(sizes)))
        demand = jax.lax.cond(jnp.all(wanted >= 0), lambda: wanted, lambda: jnp.where(wanted < 0, own(), wanted))
        told = demand.mean(1)
        if self.policy.successors:
            before = jnp.concatenate([jnp.zeros_like(demand[..., :1]), demand[..., :-1]], axis=-1)
            demand = jnp.maximum(demand, before)
        demand = jnp.where((sizes > 0)[None, None], demand, -1.0)
        chosen = jnp.sort(jax.lax.top_k(demand, self.page_pos.shape[-1] // size)[1], axis=-1)
        real = (jnp.arange(size)[None, None, None] < sizes[chosen][..., None]).reshape(*chosen.shape[:2], -1)
        k, v = self._fetched(chosen)
        places = self.first[:, None, None] + jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1
        folded = k.astype(self.k.dtype).reshape(-1, 1, *k.shape[2:])
        k = turned(folded, jnp.maximum(places, 0).reshape(-1, places.shape[-1]), call.rotary, call.rope)
        return self.replace(
            told=told, page_k=k.reshape(self.page_k.shape), page_v=v.astype(self.v.dtype),
            page_pos=jnp.where(real & self.leans[:, None, None], places, -1),
        )  # fmt: skip

    def _sizes(self) -> jax.Array:
        """i32 [p], entries of every page."""
        size = self.policy.page
        return jnp.clip(self.count[0] - jnp.arange(self.mem_k.shape[2] // size) * size, 0, size)

    def _fetched(self, chosen_bhp: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys before RoPE and values of these pages, [b, h, p * page, k]."""
        size, h = self.policy.page, self.mem_k.shape[1]
        index = (chosen_bhp[..., None] * size + jnp.arange(size)[None, None, None]).reshape(*chosen_bhp.shape[:2], -1)
        heads = jnp.arange(h)[None, :, None]
        return self.mem_k[0][heads, index], self.mem_v[0][heads, index]

    def _seen(self, scores_hrs: jax.Array) -> jax.Array:
        """Scores of queries and `mem_k`, of which a softmax is to be taken."""
        there = jnp.arange(self.mem_k.shape[2]) < self.count[0]
        return jnp.where(there[None, None], scores_hrs, NEGATIVE)

    def _compared(self) -> jax.Array:
        """i32 [1], keys that are compared with queries in a choice."""
        return self.count

    def _by_page(self, scores_hrs: jax.Array) -> jax.Array:
        """The largest scores of pages [h, r, p] for those of `mem_k`."""
        return scores_hrs.reshape(*scores_hrs.shape[:-1], -1, self.policy.page).max(-1)

    def _demand(self, plain_bhgtk: jax.Array, real_bt: jax.Array) -> jax.Array:
        """f32 [b, h, pages], the largest weight that a real query has in each page."""
        b, h, g, t, k = plain_bhgtk.shape

        def some(demand: jax.Array, block: tuple) -> tuple[jax.Array, None]:
            q, real = block
            # Queries of all rows and groups as those of one: other forms are laid out anew after the product.
            rows = q.swapaxes(0, 1).reshape(h, -1, k)
            keys = self.mem_k[0].astype(q.dtype)
            scores = jnp.einsum("hrk,hsk->hrs", rows, keys, preferred_element_type=jnp.float32) * k**-0.5
            scores = self._seen(scores)
            # The largest score of a page has its largest weight: of all others only their sum is needed.
            most = self._by_page(scores)
            top = most.max(-1, keepdims=True)
            weight = jnp.exp(most - top) / jnp.exp(scores - top).sum(-1, keepdims=True)
            weight = weight.reshape(h, b, g, -1, weight.shape[-1])
            weight = jnp.where(real[None, :, None, :, None], weight, 0.0).max((2, 3))
            return jnp.maximum(demand, weight.swapaxes(0, 1)), None

        none = jnp.zeros((b, h, len(self._sizes())), jnp.float32)
        if t <= ROWS:
            return some(none, (plain_bhgtk, real_bt))[0]
        return jax.lax.scan(some, none, (in_blocks(plain_bhgtk, 3, ROWS), in_blocks(real_bt, 1, ROWS)))[0]

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """Rows whose next tokens do not fit."""
        return length_b - self.start + more > self.k.shape[-2]

    def grow(self, length_b: np.ndarray, more: int) -> ChosenLayer:
        """Room for `more` tokens after the longest row, in the next bucket."""
        start = np.asarray(self.start).reshape(-1, len(length_b))[0]
        need = int((length_b - start).max()) + more
        if need <= self.k.shape[-2]:
            return self
        return self.replace(k=widen(self.k, bucket(need)), v=widen(self.v, bucket(need)))

    def rows(self, index_b: jax.Array, axis: int = 0) -> ChosenLayer:
        """As of `Layer`; all of them share one copy of the entries."""
        own = jax.tree.map(lambda x: jnp.take(x, index_b, axis=axis), self._own())
        return own.replace(**{name: jnp.copy(getattr(self, name)) for name in self.shared})

    def put(self, index_b: np.ndarray, other: ChosenLayer, axis: int = 0) -> ChosenLayer:
        """As of `Layer`, for rows that share the same entries."""
        own = put_rows(self._own(), other._own(), index_b, axis, self.free)
        return own.replace(**{name: getattr(self, name) for name in self.shared})

    def _own(self) -> ChosenLayer:
        # Without what is shared.
        return self.replace(**dict.fromkeys(self.shared))

    def held(self, length_b: jax.Array) -> jax.Array:
        """What is near, the tokens since, and all entries, of which a row may lean on none."""
        near = jnp.sum(self.near_pos >= 0, axis=1, dtype=jnp.int32)
        entries = jnp.where(self.leans, self.count, 0)
        return jnp.broadcast_to((entries + near + length_b - self.start)[:, None], self.k.shape[:2])

    def read(self, length_b: jax.Array) -> jax.Array:
        """What is near, the pages, the tokens since; and the keys among which is chosen once in a stride."""
        near = jnp.sum(self.near_pos >= 0, axis=1)
        pages = jnp.sum(self.page_pos >= 0, axis=2)
        # Keys are half of an entry.
        chosen = jnp.where(self.leans, self._compared(), 0) / (2 * self.policy.stride)
        return pages + (near + length_b - self.start + chosen)[:, None].astype(jnp.float32)


def wanting(memory: Memory, asked: Memory) -> Memory:
    """The memory whose layers choose the same pages for the prompt that comes: those that the heads of the `middle`
    layers of `asked`, the memory after the same prompt, have wanted most on average."""
    told = [x.told if x.told.ndim == 3 else x.told[None] for x in of(asked)]
    told = jnp.concatenate(told)
    wanted = told[middle(len(told))].mean(0)

    def agreed(x: Layer) -> Layer:
        return x.replace(wanted=jnp.broadcast_to(wanted, x.wanted.shape)) if isinstance(x, ChosenLayer) else x

    return map_layers(agreed, memory)


def of(memory: Memory) -> list[ChosenLayer]:
    """The layers of a memory that choose."""
    return [x for x in layers(memory) if isinstance(x, ChosenLayer)]


def _before_rope(call: Call) -> jax.Array:
    """Queries [b, h, g, t, k] as they were before RoPE."""
    if not call.rotary:
        return call.q
    b, h, g, t, k = call.q.shape
    _, factor = rope.frequencies(call.rotary, *call.rope)
    plain = turned(call.q.reshape(b, h * g, t, k), -call.tokens.positions, call.rotary, call.rope)
    # Turning back multiplies by the factor once more.
    scale = jnp.where(jnp.arange(k) < call.rotary, factor**-2, 1.0).astype(plain.dtype)
    return (plain * scale[None, None, None]).reshape(b, h, g, t, k)


def empty(
    mem: tuple[jax.Array, jax.Array, int], near: tuple[jax.Array, jax.Array, jax.Array], sinks: int, start: int,
    g: int, room: int, policy: Choice,
) -> ChosenLayer:  # fmt: skip
    """Stacked layers, one row, that have chosen nothing. mem: keys before RoPE and values [l, 1, h, s, k], and how
    many entries are there; near: keys and values [l, 1, h, n, k] and places [n]. sinks: places before the pages'.
    start: of the next token. g: query heads per key/value head. room: for tokens."""
    k, v, count = mem
    near_k, near_v, pos = near
    n, _, h, _, size = near_k.shape
    dtype, many, asking = near_k.dtype, policy.pages * policy.page, min(policy.queries, policy.stride)
    # Of pages on disk there are marks, and no values.
    pages = jnp.zeros((n, 1, k.shape[3] // policy.page if v.shape[3] else k.shape[3]))

    def number(x: Any) -> jax.Array:
        return jnp.full((n, 1), x, jnp.int32)

    zeros = lambda room: jnp.zeros((n, 1, h, room, size), dtype)  # noqa: E731
    return ChosenLayer(
        k, v, number(count), near_k, near_v, jnp.broadcast_to(pos, (n, 1, len(pos))).astype(jnp.int32),
        zeros(many), zeros(many), jnp.full((n, 1, h, many), -1, jnp.int32), number(sinks), zeros(room),
        zeros(room), number(start), jnp.zeros((n, 1, h, g, asking, size), dtype), number(0),
        jnp.ones((n, 1), bool), pages, pages - 1, policy,
    )  # fmt: skip
