"""The memory that all training-free policies with a fixed number of entries share: `Budget` and `BudgetLayer`.

What a policy decides is the score of every entry; entries with the largest are kept.

* The first call reads the prompt with exact attention. Then every row and head keeps its `limit` entries of largest
  score. Each row gets what it gets alone.
* A later call with several tokens (a further turn, or a continuation to be scored) attends to what is stored and to
  its own tokens, and stores all of these, so that more than `limit` entries may be held; `grow` makes room for them.
  Before, those that are too many from the turn before leave, one after another.
* A further reading of a prompt (`Policy.passes`) attends to it and to itself, and only changes the prompt's scores.
* A call with one token per row stores it in a new slot while fewer than `limit` entries are held, else in the slot of
  the entry with the least score, chosen before the token attends: a query reads its own entry and `limit - 1` others.
  Where more than `limit` are held, the call also drops the entry with the next score, until `limit` are left.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config, params
from atom_jax.kvcache import observe
from atom_jax.kvcache.dense import alone, bucket
from atom_jax.kvcache.layer import Call, Layer, Sizes, stack_layers
from atom_jax.kvcache.policy import Policy
from atom_jax.typing import AtomError

# Beyond any position.
FAR = 2**30


@dataclasses.dataclass(frozen=True)
class Budget(Policy):
    """Base of the configurations. Exactly one of budget and ratio is given.

    budget: entries per row and key/value head. ratio: entries as a share of the row's prompt, rounded down, at
    least one. prompt_only: both limit what is kept of the prompt, and later tokens are all kept (as kvpress has it);
    otherwise they limit the whole text. sinks: positions at the start of a text that are never evicted.
    biased: entries may stand for several tokens, see `absorb`. digits: scores that differ from the one at the limit
    by at most 2^-digits of it are as good as equal, and the position decides between them, so that rounding, which
    is another in other company, does not (docs/reliability.md, "Digits").
    ranges: of fields, where they are not those of `config.check`.
    """

    stepwise: ClassVar[bool] = True
    slides: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    digits: ClassVar[int] = 14
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    budget: int = 0
    ratio: float = 0.0
    sinks: int = 0
    prompt_only: bool = False

    def __post_init__(self):
        config.check(self, **self.ranges)
        if self.budget < 0 or not 0.0 <= self.ratio <= 1.0 or self.sinks < 0:
            raise AtomError(
                f"memory {self.name}: expected budget and sinks of at least 0 and ratio from 0 to 1, got budget"
                f" {self.budget}, ratio {self.ratio}, sinks {self.sinks}"
            )
        if bool(self.budget) == bool(self.ratio):
            given = "neither is given" if not self.budget else f"got budget {self.budget} and ratio {self.ratio}"
            raise AtomError(f"memory {self.name}: expected budget=ENTRIES or ratio=SHARE, {given}")

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> BudgetLayer:
        """Empty buffers; see `policy.Policy`."""
        return stack_layers(BudgetLayer.empty(self, sizes, self.slots(sizes, capacity)), len(numbers))

    def expected(self, length: int) -> int:
        """The limit, or less of a shorter text."""
        return min(length, self.budget or max(1, math.floor(length * self.ratio)))

    @property
    def fixed(self) -> int:
        """Positions at the start of a text that are never evicted."""
        return self.sinks

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Length of the buffers."""
        return min(capacity, self.budget) if self.budget else max(1, math.ceil(capacity * self.ratio))

    def share(self, length_b: jax.Array, longest: int) -> jax.Array:
        """i32 [b]: `ratio` of each of the lengths (at most `longest`), rounded down in double precision."""
        table = np.floor(np.arange(longest + 1) * self.ratio).astype(np.int32)
        return jnp.asarray(np.maximum(table, 1))[length_b]

    def allow(self, layer: BudgetLayer, call: Call) -> jax.Array:
        """i32 [b, h]: entries that the prompts of a call leave room for."""
        if self.budget:
            return layer.limit
        return jnp.broadcast_to(self.share(call.after, call.k.shape[2])[:, None], layer.limit.shape)

    def later(self, limit_bh: jax.Array) -> jax.Array:
        """i32 [b, h]: the limit for tokens after the prompts, of which `limit` entries stay."""
        return jnp.full_like(limit_bh, FAR) if self.prompt_only else limit_bh

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """i32 [b, h]: how many of the newest entries are not to be evicted."""
        return jnp.zeros_like(limit_bh)

    def token_score(self, call: Call) -> jax.Array:
        """float32 [b, h, t]: what new tokens start with."""
        return jnp.full(call.k.shape[:3], jnp.inf)

    def prompt(self, entries: Entries, call: Call) -> jax.Array:
        """float32 [b, h, t]: scores of a prompt's keys."""
        return self.observe(entries, call)

    def observe(self, entries: Entries, call: Call) -> jax.Array:
        """float32 [b, h, s]: scores after several new tokens, the last of the s entries."""
        return entries.score

    def step(self, layer: BudgetLayer, weights_bhgc: jax.Array) -> jax.Array:
        """float32 [b, h, c]: scores after one new token, already stored, which gave the entries these weights."""
        return layer.score

    def noted(self, entries: Entries, call: Call) -> Any:
        """Notes after several new tokens, the last of the s entries."""
        return entries.notes

    def noted_one(self, layer: BudgetLayer, weights_bhgc: jax.Array, call: Call) -> Any:
        """Notes after one new token, as `step`."""
        return layer.notes

    def blank(self, *shape: int) -> Any:
        """Notes on entries of which nothing is known, a pytree of arrays float32 of this shape, or None."""
        return None

    def reread(self, entries: Entries, call: Call) -> jax.Array:
        """float32 [b, h, c]: scores of a prompt's entries when it is read again; the last t are the call's own."""
        return entries.score[..., : -call.k.shape[2]]

    def compact(
        self, layer: BudgetLayer, entries: Entries, length_b: jax.Array, limit_bh: jax.Array
    ) -> tuple[BudgetLayer, Entries, jax.Array, jax.Array]:
        """What `choose` and `gather` make of a prompt: the layer, the entries, which of them stay, and the limit."""
        keep, limit = self.choose(entries, length_b, limit_bh)
        return *self.gather(layer, entries, keep), keep, limit

    def gather(self, layer: BudgetLayer, entries: Entries, keep: jax.Array) -> tuple[BudgetLayer, Entries]:
        """A prompt's entries, of which those `keep`, bool [b, h, t], are about to stay: they may take up what the
        others held. And the empty layer, which may keep something besides."""
        return layer, entries

    def absorb(self, layer: BudgetLayer, slot_bh: jax.Array, live_bh: jax.Array) -> BudgetLayer:
        """The layer before the entry in a slot leaves it, where `live`: others may take up what it held."""
        return layer

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Entries of a prompt to keep, bool [b, h, t], and the limit i32 [b, h] from then on."""
        score = self.guarded(entries, length_b - 1, limit_bh)
        return keep_largest(score, self.order(entries.pos), limit_bh, self.digits), limit_bh

    def guarded(self, entries: Entries, last_b: jax.Array, limit_bh: jax.Array) -> jax.Array:
        """Scores, +inf for sinks and recent entries; -inf for empty slots. last: i32 [b], the newest position."""
        guard = entries.pos < self.fixed
        guard |= entries.pos > last_b[:, None, None] - self.recent(limit_bh)[:, :, None]
        return jnp.where(entries.pos < 0, -jnp.inf, jnp.where(guard, jnp.inf, entries.score))

    def order(self, pos: jax.Array) -> jax.Array:
        """What decides between equal scores, larger is better: sinks first, then the newest."""
        return jnp.where((pos >= 0) & (pos < self.fixed), FAR - pos, pos)


@struct.dataclass
class Entries:
    """Keys and values k, v [b, h, s, k], positions i32 [b, h, s] (-1: empty), scores float32 [b, h, s], the bias on
    their scores in attention, float32 [b, h, s], or None, and notes (`Budget.blank`)."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    score: jax.Array
    bias: Any = None
    notes: Any = None

    def join(self, other: Entries) -> Entries:
        """These entries and then those."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2), self, other)


def put(old: jax.Array, new: jax.Array, slot_bh: jax.Array) -> jax.Array:
    """The array [b, h, c, ...] with [b, h, ...] at these slots, i32 [b, h]; nothing past the last one."""
    # One scatter index per row and head: XLA then updates in place.
    place = old.at[jnp.arange(old.shape[0])[:, None], jnp.arange(old.shape[1])[None], slot_bh]
    return place.set(new.astype(old.dtype), mode="drop", unique_indices=True)


def tied(score: jax.Array, at: jax.Array, digits: int) -> jax.Array:
    """Whether scores are as good as equal to others: to at most 2^-digits of these."""
    return (score == at) | (jnp.isfinite(at) & (jnp.abs(score - at) <= 2.0**-digits * jnp.abs(at)))


def keep_largest(score: jax.Array, order: jax.Array, limit: jax.Array, digits: int) -> jax.Array:
    """True for the `limit` [...] entries of largest score [..., s], by `order` where scores are `tied` with the least
    of these; never for scores of -inf."""
    number = jax.lax.broadcasted_iota(jnp.int32, score.shape, score.ndim - 1)
    last = jnp.clip(limit - 1, 0, score.shape[-1] - 1)[..., None]
    at = -jnp.take_along_axis(jnp.sort(-score, axis=-1), last, axis=-1)
    ties = tied(score, at, digits)
    place = jnp.where(ties, 1, jnp.where(score > at, 0, 2))
    best = jax.lax.sort((place, -order, number), num_keys=2)[2]
    return (jnp.argsort(best, axis=-1) < limit[..., None]) & (score > -jnp.inf)


@struct.dataclass
class BudgetLayer(Layer):
    """The memory of one layer, c slots per row and head.

    k, v: [b, h, c, k]. pos: i32 [b, h, c], position of the entry, -1 in empty slots. score: float32 [b, h, c]. bias:
    float32 [b, h, c], added to the entry's score in attention, or None.
    notes: arrays [b, h, c], as in `Entries`, or None.
    n: i32 [b, h], entries held. limit: i32 [b, h], entries that single tokens leave. extra: what else the policy
    keeps, arrays [b, ...]. policy: static.
    """

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    score: jax.Array
    n: jax.Array
    limit: jax.Array
    bias: Any = None
    notes: Any = None
    extra: Any = None
    policy: Budget = struct.field(pytree_node=False, default=None)

    free: ClassVar[dict[str, float]] = {"pos": -1}

    @classmethod
    def empty(cls, policy: Budget, sizes: Sizes, slots: int) -> BudgetLayer:
        """A layer with nothing in it."""
        shape = (sizes.b, sizes.h, slots)
        k, v = (jnp.zeros((*shape, sizes.k), sizes.dtype) for _ in range(2))
        n = jnp.zeros(shape[:2], jnp.int32)
        bias = jnp.zeros(shape) if policy.biased else None
        pos, score, limit = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape), n + policy.budget
        return cls(k, v, pos, score, n, limit, bias, policy.blank(*shape), None, policy)

    @property
    def entries(self) -> Entries:
        """What is stored."""
        return Entries(self.k, self.v, self.pos, self.score, self.bias, self.notes)

    def extend(self, call: Call) -> tuple[jax.Array, BudgetLayer]:
        """Attends, stores and evicts as the module says; see `layer.Layer`."""
        if not call.fresh and call.q.shape[3] == 1:
            return self._step(call)
        pos = jnp.where(call.real, call.tokens.positions, -1)
        pos = jnp.broadcast_to(pos[:, None], call.k.shape[:3])
        bias = None if self.bias is None else jnp.zeros(pos.shape)
        new = Entries(call.k, call.v, pos, self.policy.token_score(call), bias, self.policy.blank(*pos.shape))
        if call.fresh:
            out = alone(call, call.window)
            new = new.replace(score=self.policy.prompt(new, call), notes=self.policy.noted(new, call))
            layer, new, keep, limit = self.policy.compact(self, new, call.after, self.policy.allow(self, call))
            return out, layer._put(new, keep).replace(limit=self.policy.later(limit))
        old = self if call.reading else self._shed(call)
        new = old.entries.join(new)
        out = observe.attend_entries(call.q, call.tokens, new.k, new.v, new.pos, new.bias, call.window)
        if call.reading:
            return out, self.replace(score=self.policy.reread(new, call))
        changed = jnp.broadcast_to(call.real[:, :1, None], new.pos.shape)
        after = self.policy.observe(new, call), self.policy.noted(new, call)
        score, notes = jax.tree.map(lambda a, b: jnp.where(changed, a, b), after, (new.score, new.notes))
        new = new.replace(score=score, notes=notes)
        return out, old._put(new, new.pos >= 0)

    def _shed(self, call: Call) -> BudgetLayer:
        """The layer with no more entries than the limit, in rows that go on."""
        over = lambda layer: (layer.n > layer.limit) & call.real[:, :1]  # noqa: E731
        slots = self.k.shape[2]

        def one(layer: BudgetLayer) -> BudgetLayer:
            leaves = over(layer)
            slot = jnp.where(leaves, layer._victim(layer.pos, call), slots)
            layer = self.policy.absorb(layer, slot, leaves)
            gone = jnp.arange(slots)[None, None] == slot[..., None]
            return layer.replace(pos=jnp.where(gone, -1, layer.pos), n=layer.n - leaves)

        return jax.lax.while_loop(lambda layer: jnp.any(over(layer)), one, self)

    def _put(self, new: Entries, keep: jax.Array) -> BudgetLayer:
        """The layer with exactly the entries to keep, by position; later ones beyond the last slot are lost."""
        c, s = self.k.shape[2], keep.shape[2]
        index = jnp.argsort(jnp.where(keep, new.pos, FAR), axis=-1)[..., :c]
        n = jnp.minimum(jnp.sum(keep, axis=-1, dtype=jnp.int32), c)

        def take(x: jax.Array, old: jax.Array) -> jax.Array:
            at = index if x.ndim == 3 else index[..., None]
            x = jnp.take_along_axis(x, at, axis=2).astype(old.dtype)
            return jnp.pad(x, [(0, max(c - s, 0) if i == 2 else 0) for i in range(x.ndim)])

        one = jax.tree.map(take, new, self.entries)
        held = jnp.arange(c)[None, None] < n[..., None]
        pos = jnp.where(held, one.pos, -1)
        return self.replace(k=one.k, v=one.v, pos=pos, score=one.score, bias=one.bias, notes=one.notes, n=n)

    def _step(self, call: Call) -> tuple[jax.Array, BudgetLayer]:
        b, h, c, _ = self.k.shape
        real, at = call.real, call.tokens.positions
        fits, over = self.n < self.limit, (self.n > self.limit) & real
        slot = jnp.where(fits, jnp.argmin(self.pos, axis=-1), self._victim(self.pos, call))
        slot = jnp.where(real, slot, c)
        rest = jnp.where(jnp.arange(c)[None, None] == slot[..., None], -1, self.pos)
        dropped = jnp.where(over, self._victim(rest, call), c)
        old = self.policy.absorb(self, slot, real & ~fits)
        old = self.policy.absorb(old.replace(pos=rest), dropped, over)
        pos = put(old.pos, jnp.broadcast_to(at, (b, h)), slot)
        new = old.replace(
            k=put(old.k, call.k[:, :, 0], slot),
            v=put(old.v, call.v[:, :, 0], slot),
            pos=put(pos, jnp.full((b, h), -1), dropped),
            score=put(old.score, self.policy.token_score(call)[:, :, 0], slot),
            bias=None if old.bias is None else put(old.bias, jnp.zeros((b, h)), slot),
            notes=jax.tree.map(lambda x, new: put(x, new, slot), old.notes, self.policy.blank(b, h)),
            n=self.n + jnp.where(fits & real, 1, 0) - over.astype(jnp.int32),
        )
        seen = new.pos >= 0
        seen = seen if call.window is None else seen & (at[..., None] - new.pos < call.window)
        out, weights = observe.attend_one(call.q[..., 0, :], new.k, new.v, seen, new.bias)
        changed = jnp.broadcast_to(real[..., None], new.score.shape)
        after = self.policy.step(new, weights), self.policy.noted_one(new, weights, call)
        score, notes = jax.tree.map(lambda a, b: jnp.where(changed, a, b), after, (new.score, new.notes))
        return out[..., None, :], new.replace(score=score, notes=notes)

    def _victim(self, pos: jax.Array, call: Call) -> jax.Array:
        """i32 [b, h]: slot with the least score; of several `tied` ones the one that `Budget.order` puts last."""
        score = self.policy.guarded(self.entries.replace(pos=pos), call.length - 1, self.limit)
        score = jnp.where(pos < 0, jnp.inf, score)
        order = jnp.where(pos < 0, 2 * FAR - 1, self.policy.order(pos))
        least = tied(score, score.min(-1, keepdims=True), self.policy.digits)
        return jnp.argmin(jnp.where(least, order, 2 * FAR - 1), axis=-1)

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """Rows where a head may hold more, but has no slots for it; at its limit it uses slots again."""
        after = jnp.minimum(self.n + more, self.limit)
        return jnp.any((self.n < self.limit) & (after > self.k.shape[-2]), axis=-1)

    def grow(self, length_b: np.ndarray, more: int) -> BudgetLayer:
        """Room for `more` further tokens in one call."""
        if more == 1:
            return self.grow_singly(length_b, 1)
        need = int(np.minimum(self.n, self.limit).max()) + more
        return self._resized(max(need, int(np.asarray(self.n).max())), bucket(need))

    def grow_singly(self, length_b: np.ndarray, more: int) -> BudgetLayer:
        """Room for `more` single tokens, of which full heads need none."""
        return self._resized(*self._needed(more))

    def fit(self, length_b: np.ndarray, more: int) -> BudgetLayer:
        """Room for `more` single tokens, without the slots in which prompts and later turns are read."""
        return self._resized(*self._needed(more), shrink=True)

    def trim(self) -> BudgetLayer:
        """Slots for what is held, where the policy shrinks."""
        return self.grow_singly(None, 1) if self.policy.shrinks else self

    def _needed(self, more: int) -> tuple[int, int]:
        """Slots for `more` single tokens, and for all that single tokens leave."""
        n, limit = np.asarray(self.n), np.asarray(self.limit)
        need = int(np.where(n < limit, np.minimum(n.astype(np.int64) + more, limit), n).max())
        return need, max(int(limit.max()), int(n.max()))

    def _resized(self, need: int, most: int, shrink: bool = False) -> BudgetLayer:
        """The same entries in at least `need` slots, and more than `most` only where that many are needed. shrink: in
        fewer than now where these suffice, as for policies that shrink."""
        slots = self.k.shape[-2]
        if shrink or self.policy.shrinks:
            taken = np.asarray(self.pos) >= 0
            need = max(need, int(taken.any(tuple(range(taken.ndim - 1))).nonzero()[0].max(initial=-1)) + 1)
        elif need <= slots:
            return self
        size = min(bucket(need), max(most, need))

        def fit(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
            x = jax.lax.slice_in_dim(x, 0, min(size, slots), axis=x.ndim + axis)
            widths = [(0, max(size - slots, 0) if i == x.ndim + axis else 0) for i in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=fill)

        score, bias, notes = jax.tree.map(lambda x: fit(x, -1), (self.score, self.bias, self.notes))
        k, v, pos = fit(self.k, -2), fit(self.v, -2), fit(self.pos, -1, -1)
        return self.replace(k=k, v=v, pos=pos, score=score, bias=bias, notes=notes)

    def row_bytes(self, tokens: int) -> int:
        """With a slot for every token, where only what is kept of prompts is limited."""
        slots = self.k.shape[-2]
        more = max(tokens - slots, 0) if self.policy.prompt_only else 0
        return super().row_bytes(tokens) + more * (params.nbytes(self.entries) // slots)

    def held(self, length_b: jax.Array) -> jax.Array:
        """Entries stored: at most the limit, after single tokens."""
        return self.n
