"""Decisions that are revised (ours): what is held is looked at again and again, and leaves once it is of no use.

A decision that is taken once cannot know that an entry will be dead later on, so what learned eviction holds grows
with the text. Here every entry beyond the window has an account: the attention that it received, and what an average
entry would have received of the same queries. Every so many tokens of a row the accounts are closed, entries that got
too little leave, and the pages are laid out anew without them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.kvcache.dms.config import FORMS
from atom_jax.kvcache.dms.policy import DMS
from atom_jax.kvcache.dms.serve import DMSLayer, Ring
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policy import Policy, Seen
from atom_jax.kvcache.pool import NEVER
from atom_jax.nn.attention import Tokens
from atom_jax.params import Tree
from atom_jax.typing import AtomError

# Fields that DMS does not have.
OWN = ("every", "share", "decay")


@config.register
@dataclasses.dataclass(frozen=True)
class Revised(DMS):
    """Learned eviction (DMS) whose decisions are revised, per key/value head. Other fields than these as in DMS.

    A key that leaves the window goes or stays as DMS decides. Of those that stayed, the ones go that received less
    than `share` of what an average entry did: a row looks when it has `every` further tokens, before it reads the
    next one. An entry's attention is that of all queries more than `window` tokens after it, and of all query heads
    of its group; an average one receives a query's attention divided by the number of entries that this query sees.
    Both are sums, of which `decay` is left after each look. Entries are judged once they have been beyond the window
    for `every` tokens; sinks never.

    Looks fall at the same positions however a text is read, so of a prompt is held what is held of it token by token.
    Attention without a memory (training, `apply`) follows DMS's decisions and revises none.

    form: "all": everything that leaves the window stays until it is revised, for models without evictors; "model":
        what the model's own evictors (DMS) decide, whose other fields hold too; or a form of DMS, with what a model
        has learned under that policy. A saved model has its evictors, and not that they are revised: that is how it
        is run, not what it learned.
    """

    name: ClassVar[str] = "revised"
    forms: ClassVar[tuple[str, ...]] = ("all", "model", *FORMS)
    fields: ClassVar[frozenset[str]] = frozenset()
    form: str = "all"
    window: int = 128
    sinks: int = 4
    every: int = 64
    share: float = 0.1
    decay: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        config.check(self, separators=(0, 2**28), every=(1, 2**24), share=(0, 1), decay=(0, 1))
        theirs = [f for f in dataclasses.fields(self) if f.name not in ("form", *OWN)]
        given = [f.name for f in theirs if getattr(self, f.name) != f.default]
        if self.form == "model" and given:
            raise AtomError(f"memory.form: model, whose evictors have a {given[0]} of their own: leave it out")

    @classmethod
    def of(cls, dms: DMS, **more: Any) -> Revised:
        """The same evictors, revised. more: further fields."""
        return cls(**{f.name: getattr(dms, f.name) for f in dataclasses.fields(DMS)} | more)

    def over(self, own: tuple[Policy, ...]) -> Revised:
        """With the model's own evictors, where the form is "model"."""
        if self.form != "model":
            return self
        evictors = [policy for policy in own if isinstance(policy, DMS) and policy.form in FORMS]
        if len(evictors) != 1:
            raise AtomError("memory revised: form=model is for models with learned evictors (DMS) of one kind")
        return self.of(evictors[0], **{name: getattr(self, name) for name in OWN})

    @property
    def learned_as(self) -> str:
        """As evictors whose decisions are not revised."""
        return DMS.name

    def spec(self, projections: Tree) -> Tree:
        """That of the evictors."""
        if self.form == "model":
            raise AtomError("memory revised: form=model is for a model that is there (`registry.with_memory`)")
        return super().spec(projections)

    def train(self, call: Call) -> Seen:
        """As DMS; everything, where nothing decides."""
        return Policy.train(self, call) if self.form == "all" else super().train(call)

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> RevisedLayer:
        """An empty paged cache, with accounts."""
        layer = super().init(sizes, capacity, numbers)
        account = Account.new(jnp.zeros(layer.k.shape[:-1], jnp.int32))
        return RevisedLayer(layer.pool.replace(notes=account), layer.ring, self)

    def expected(self, length: int) -> int:
        """As of DMS: of what is revised there is less, but nobody knows how much."""
        return length if self.form == "all" else super().expected(length)

    def describe(self) -> str:
        """What decides, and what is revised."""
        what = f"everything, window {self.window}" if self.form == "all" else super().describe()
        return f"{what}; every {self.every} tokens leaves what got less than {self.share:g} of the mean attention"

    def to_hf(self, family: str) -> dict[str, Any]:
        """Those of the evictors."""
        return {} if self.form in ("all", "model") else super().to_hf(family)

    @classmethod
    def from_hf(cls, fields: Fields) -> None:
        """Evictors are read as DMS."""


@struct.dataclass
class Account:
    """Of entries [p, c]: their positions, i32; the attention that they received from queries beyond their window, and
    that average entries would have, both decayed, f32."""

    pos: jax.Array
    got: jax.Array
    due: jax.Array

    @classmethod
    def new(cls, pos: jax.Array) -> Account:
        """Of entries at these positions that no query saw yet."""
        return cls(pos, jnp.zeros(pos.shape), jnp.zeros(pos.shape))

    def add(self, got: jax.Array, due: jax.Array, where: Any = True) -> Account:
        """With what further queries paid."""
        return self.replace(got=self.got + jnp.where(where, got, 0.0), due=self.due + jnp.where(where, due, 0.0))


@struct.dataclass
class RevisedLayer(DMSLayer):
    """The memory of one layer; the notes of its pool are an `Account`."""

    def _one(self, call: Call) -> tuple[jax.Array, RevisedLayer, Any]:
        """One token of every row, before it a look where it is time for one."""
        b, h, g, _, _ = call.q.shape

        def look(loop: tuple[RevisedLayer, jax.Array]) -> tuple[RevisedLayer, jax.Array]:
            layer, falls = loop[0]._looked(call)
            return layer._without(falls), jnp.bool_(False)

        # A loop of at most one round: a branch would copy the pages where nobody looks.
        layer, _ = jax.lax.while_loop(lambda loop: loop[1], look, (self, jnp.any(self._looks(call))))
        layer, evidence = layer._placed(call, Account.new(jnp.broadcast_to(call.length[:, None], (b, h))))
        pool, ring, account = layer.pool, layer.ring, layer.pool.notes
        out, scores, lse = pool.attend_one(call.q[..., 0, :])
        if ring.stats is not None:
            ring = ring.replace(stats=self._observe(ring, scores, call))
        here = layer._by_page(jnp.where(call.real[:, 0], call.length, -1))
        got = jnp.exp(scores - lse.reshape(-1, g)[pool.row_of][..., None]).sum(1)
        due = g / jnp.maximum(pool.n, 1).reshape(-1)[pool.row_of][:, None]
        account = account.add(got, due, pool.there & (account.pos + self.policy.window < here))
        layer = layer.replace(pool=pool.replace(notes=account), ring=ring)
        return out[..., None, :].astype(call.q.dtype), layer, evidence

    def _decided(
        self, z_bht: jax.Array, stats_bhtf: Any, positions_bt: jax.Array, learned: Any, evidence_btc: Any
    ) -> tuple[jax.Array, Any]:
        if self.policy.form == "all":
            return jnp.zeros(z_bht.shape, bool), None
        return super()._decided(z_bht, stats_bhtf, positions_bt, learned, evidence_btc)

    def _many(self, call: Call) -> tuple[jax.Array, RevisedLayer, Any]:
        """Several tokens of every row, from look to look."""
        every, (b, h, g, t, size) = self.policy.every, call.q.shape
        begun, width = call.length % every, min(every, t)
        parts = -(-t // every) if call.fresh else -(-(t + every - 1) // every)
        first = lambda i: jnp.maximum(i * every - begun, 0)  # noqa: E731

        def read(layer: RevisedLayer, i: jax.Array) -> tuple[RevisedLayer, tuple[jax.Array, Any]]:
            return layer._part(_cut(call, first(i), first(i + 1), width))

        layer, (out, evidence) = jax.lax.scan(read, self, jnp.arange(parts))
        column = jnp.arange(t)[None]
        part = (column + begun[:, None]) // every
        at = part * width + column - jnp.maximum(part * every - begun[:, None], 0)
        out = jnp.moveaxis(out, 0, 3).reshape(b, h, g, parts * width, size)
        if evidence is not None:
            evidence = jnp.moveaxis(evidence, 0, 1).reshape(b, parts * width, -1)
            evidence = jnp.take_along_axis(evidence, at[..., None], axis=1)
        return jnp.take_along_axis(out, at[:, None, None, :, None], axis=3), layer, evidence

    def _part(self, call: Call) -> tuple[RevisedLayer, tuple[jax.Array, Any]]:
        """Several tokens of every row, before the first of them a look where it is time for one. All are put into the
        pages, whatever is to become of them, and attend to what is there then."""
        policy, real, shape = self.policy, call.real, call.k.shape[:3]
        tokens = Tokens(call.tokens.positions, real.astype(jnp.int32))
        known = self.ring.positions(call.length)
        ring, z, stats = self._told(call, tokens)
        evict, old, evidence = self._leaving(ring, known, z, stats, tokens, call)
        pos = jnp.broadcast_to(tokens.positions[:, None], shape)
        ends = jnp.where(evict, pos + policy.window + 1, NEVER)
        ends = jnp.concatenate([old, ends], axis=2)
        added = jnp.broadcast_to(real[:, None], shape)
        looked, falls = self._looked(call)
        stays = looked.pool.there & ~falls
        pool, moved, to = looked.pool.rebuild(stays, call.k, call.v, added, notes_bht=Account.new(pos))
        ring = ring.replace(slot=moved[ring.slot])
        slots = jnp.concatenate([jnp.where((known >= 0)[:, None], ring.slot, NEVER), to], axis=2)
        until, account = self._by_entry(slots, ends), pool.notes
        total, top, out = pool.attend_many(call.q, tokens.positions, until, account.pos)
        total = jnp.maximum(total, 1e-30)
        at, beyond = jnp.where(real, tokens.positions, -1), account.pos + policy.window + 1
        got = pool.received(call.q, at, until, beyond, top + jnp.log(total))
        layer = self.replace(pool=pool, ring=self._renewed(ring, Ring(to, z, stats), call))
        seen = pool.n[..., None] - _fewer(call, ends)
        due = layer._since(jnp.where(added, call.q.shape[2] / seen, 0.0), beyond - layer._by_page(call.length))
        layer = layer.replace(pool=pool.replace(notes=account.add(got, due)))
        if policy.form != "all":
            layer = layer._without(until < layer._by_page(call.after))
        return layer, ((out / total[..., None]).astype(call.q.dtype), evidence)

    def _since(self, x_bht: jax.Array, first_pc: jax.Array) -> jax.Array:
        """f32 [p, c]: sums over the tokens of an entry's row from token `first` on."""
        sums = jnp.pad(jnp.cumsum(x_bht, axis=2), ((0, 0), (0, 0), (1, 0))).reshape(self.pool.rows, -1)
        row = self.pool.row_of[:, None]
        return sums[:, -1][row] - sums[row, jnp.clip(first_pc, 0, x_bht.shape[2])]

    def _looks(self, call: Call) -> jax.Array:
        """bool [b]: rows that look before these tokens are read."""
        return call.real[:, 0] & (call.length > 0) & (call.length % self.policy.every == 0)

    def _looked(self, call: Call) -> tuple[RevisedLayer, jax.Array]:
        """The layer with accounts that are closed where a row looks, and what falls then, bool [p, c]."""
        policy, account = self.policy, self.pool.notes
        looks = self._by_page(self._looks(call))
        judged = looks & (account.pos < self._by_page(call.length - policy.every - policy.window))
        falls = judged & (account.pos >= policy.sinks) & (account.got < policy.share * account.due)
        left = jnp.where(looks, policy.decay, 1.0)
        account = account.replace(got=account.got * left, due=account.due * left)
        return self.replace(pool=self.pool.replace(notes=account)), falls

    def _without(self, falls_pc: jax.Array) -> RevisedLayer:
        """The layer laid out anew without these entries."""
        pool = self.pool
        none = jnp.zeros((*pool.n.shape, 0), jnp.int32)
        k, v = (jnp.zeros((*none.shape, x.shape[-1]), x.dtype) for x in (pool.k, pool.v))
        pool, moved, _ = pool.rebuild(pool.there & ~falls_pc, k, v, none > 0, notes_bht=Account.new(none))
        return self.replace(pool=pool, ring=self.ring.replace(slot=moved[self.ring.slot]))

    def _by_page(self, x_b: jax.Array) -> jax.Array:
        """Of every page what is so of its sequence, [p, 1]."""
        return x_b[self.pool.row_of // self.pool.n.shape[1]][:, None]


def _fewer(call: Call, ends_bhs: jax.Array) -> jax.Array:
    """i32 [b, h, t]: how many entries each token does not see of those that are there once all are; ends: i32 [b, h,
    s], the first positions that do not see entries."""
    (b, h, t, _), later = call.k.shape, jnp.sum(call.real, axis=1, dtype=jnp.int32)
    column = jnp.clip(ends_bhs - call.length[:, None, None], 0, t)
    gone = jnp.zeros((b, h, t + 1), jnp.int32)
    gone = gone.at[jnp.arange(b)[:, None, None], jnp.arange(h)[None, :, None], column].add(1)
    later = later[:, None, None] - jax.lax.broadcasted_iota(jnp.int32, (b, h, t), 2) - 1
    return later + jnp.cumsum(gone[..., :t], axis=2)


def _cut(call: Call, first_b: jax.Array, end_b: jax.Array, width: int) -> Call:
    """The call with the tokens of every row in columns from `first` to before `end`, at most `width` of them."""
    t = call.q.shape[3]
    column = first_b[:, None] + jnp.arange(width)[None]
    at = jnp.minimum(column, t - 1)
    real = (column < jnp.minimum(end_b, t)[:, None]) & jnp.take_along_axis(call.real, at, axis=1)

    def take(x: jax.Array, axis: int) -> jax.Array:
        index = at.reshape([n if i in (0, axis) else 1 for i, n in enumerate((len(at), *(width,) * (x.ndim - 1)))])
        return jnp.take_along_axis(x, index, axis=axis)

    k, v, said = jax.tree.map(lambda x: take(x, 2), (call.k, call.v, call.said))
    evidence = None if call.evidence is None else take(call.evidence, 1)
    tokens = Tokens(take(call.tokens.positions, 1), real.astype(jnp.int32))
    length = jnp.minimum(call.length + first_b, call.after)
    return call.replace(
        q=take(call.q, 3), k=k, v=v, said=said, evidence=evidence, k_plain=None, ids=None, tokens=tokens,
        length=length, fresh=False,
    )  # fmt: skip
