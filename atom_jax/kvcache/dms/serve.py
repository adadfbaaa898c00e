"""The serving cache of Dynamic Memory Sparsification: what a head evicts makes room for what comes.

A head retains the keys that are not evicted and those of the last window + 1 tokens. These last ones lie in a ring by
position modulo its length R = window + 1, with the evidence for the decision that falls when a key leaves the window:
the key of token p then lends its place to that of token p + R (Łańcucki et al., 2025; the cache of NVIDIA's
Model-Optimizer in other words). Any number of tokens may follow at any time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache.dense import FEW
from atom_jax.kvcache.dms import decide, observed
from atom_jax.kvcache.dms.config import FEATURES, Settings
from atom_jax.kvcache.layer import Call, Sizes, stack_layers
from atom_jax.kvcache.learned import shift
from atom_jax.kvcache.paged import PagedLayer, attend_both
from atom_jax.kvcache.pool import NEGATIVE, NEVER, Pool, coarse
from atom_jax.nn.attention import Tokens, attend

UNDECIDED = -1e9


@struct.dataclass
class Ring:
    """The last R tokens of every row, at position mod R.

    slot: i32 [b, h, R], flat index in the pool. z: f32 [b, h, R], the decision logit about the token. stats: f32
    [b, h, R, 3], largest, summed and recent attention that its key received so far (`observed`), or None.
    """

    slot: jax.Array
    z: jax.Array
    stats: Any

    def positions(self, length_b: jax.Array) -> jax.Array:
        """Positions i32 [b, R] of the tokens of rows that have `length_b`; negative where there is none."""
        last = (length_b - 1)[:, None]
        size = self.slot.shape[-1]
        return last - (last - jnp.arange(size)[None]) % size


@struct.dataclass
class DMSLayer(PagedLayer):
    """The memory of one layer. policy: static."""

    pool: Pool
    ring: Ring
    policy: Settings = struct.field(pytree_node=False)

    def extend(self, call: Call) -> tuple[jax.Array, DMSLayer]:
        """Reads new tokens; see `layer.Layer`."""
        return self.passing(call)[:2]

    def passing(self, call: Call) -> tuple[jax.Array, DMSLayer, Any]:
        """As `extend`, with the evidence about the keys that leave the window meanwhile."""
        return self._one(call) if call.q.shape[3] == 1 else self._many(call)

    def store(self, call: Call) -> DMSLayer:
        """A few tokens are put where there is room; many lay the pool out anew."""
        return (self.one_by_one if call.q.shape[3] <= FEW else self.extend)(call)[1]

    def copied(self, index_b: jax.Array, pages: int) -> DMSLayer:
        pool, slot = self.pool.rows_of(index_b, self.ring.slot[index_b], pages)
        ring = jax.tree.map(lambda x: x[index_b], self.ring)
        return self.replace(pool=pool, ring=ring.replace(slot=slot))

    def after(self, other: DMSLayer) -> DMSLayer:
        later = other.ring.replace(slot=other.ring.slot + self.k.shape[0] * self.k.shape[1])
        ring = jax.tree.map(lambda *x: jnp.concatenate(x), self.ring, later)
        return self.replace(pool=self.pool.joined(other.pool), ring=ring)

    def _decided(
        self, z_bht: jax.Array, stats_bhtf: Any, positions_bt: jax.Array, learned: Any, evidence_btc: Any
    ) -> tuple[jax.Array, Any]:
        """bool [b, h, t], what is decided about keys, and the evidence about them with what was seen here."""
        if self.policy.form == "observed":
            seen = observed.features(*(stats_bhtf[..., i] for i in range(FEATURES)))
            more, evidence_btc = decide.from_observed(learned, seen, evidence_btc, self.policy)
            z_bht = z_bht + more
        z_bht = decide.agreed(z_bht, self.policy)
        return (z_bht > 0) & (positions_bt >= self.policy.sinks)[:, None], evidence_btc

    def _one(self, call: Call) -> tuple[jax.Array, DMSLayer, Any]:
        """One token of every row."""
        layer, evidence = self._placed(call)
        ring, pool = layer.ring, layer.pool
        if ring.stats is None and pool.by_kernel:
            out = pool.attend_pages(call.q[..., 0, :])
        else:
            out, scores, _ = pool.attend_one(call.q[..., 0, :])
        if ring.stats is not None:
            ring = ring.replace(stats=self._observe(ring, scores, call))
        return out[..., None, :].astype(call.q.dtype), layer.replace(ring=ring), evidence

    def _placed(self, call: Call, notes_bh: Any = None) -> tuple[DMSLayer, Any]:
        """The layer with one token of every row in its place: that of the token that leaves the window, where this is
        evicted; and the evidence about the latter. notes: as in the pool."""
        ring, size = self.ring, self.ring.slot.shape[-1]
        b, h = self.pool.n.shape
        live, place = call.real, (call.length % size)[:, None]
        here = jnp.broadcast_to((live & (jnp.arange(size)[None] == place))[:, None], (b, h, size))
        # The token that leaves the window, whose place in the ring is the new one's.
        at = jnp.broadcast_to(place[:, None], (b, h, 1))
        gone = jax.tree.map(lambda x: _take(x, at), ring)
        evicted, evidence = self._decided(
            gone.z, gone.stats, call.length[:, None] - size, call.learned, call.evidence
        )
        evicted = evicted[..., 0] & (call.length >= size)[:, None]
        instead = jnp.where(evicted, gone.slot[..., 0], -1)
        new, live = (call.k[:, :, 0], call.v[:, :, 0]), jnp.broadcast_to(live, (b, h))
        pool, slot = self.pool.put(*new, instead, live, notes_bh=notes_bh)
        z = self._say(call)
        ring = Ring(
            jnp.where(here, slot[..., None], ring.slot),
            jnp.where(here, UNDECIDED if self.policy.late else call.said, z),
            None if ring.stats is None else jnp.where(here[..., None], 0.0, ring.stats),
        )
        return self.replace(pool=pool, ring=ring), evidence

    def _say(self, call: Call) -> jax.Array:
        """The ring's logits, with what the first new token of every row says of the token before it."""
        ring = self.ring
        if not self.policy.late:
            return ring.z
        size = ring.slot.shape[-1]
        previous = (jnp.arange(size)[None] == (call.length[:, None] - 1) % size) & call.real[:, :1]
        previous &= (call.length > 0)[:, None]
        return jnp.where(previous[:, None], call.said[:, :, :1], ring.z)

    def _observe(self, ring: Ring, scores_pgc: jax.Array, call: Call) -> jax.Array:
        """The ring's statistics after one more query: `observed.received` for the newest token's."""
        page, window = scores_pgc.shape[2], self.policy.window
        positions = ring.positions(call.length + 1)
        scores = scores_pgc[ring.slot // page, :, ring.slot % page]
        there = jnp.broadcast_to((positions >= 0)[:, None, :, None], scores.shape)
        weights = jax.nn.softmax(jnp.where(there, scores, NEGATIVE), axis=2)
        distance = call.length[:, None] - positions
        other = call.real & (distance > 0) & (positions >= 0)
        weights = jnp.where(jnp.broadcast_to(other[:, None, :, None], scores.shape), weights, 0.0)
        late = jnp.where((distance > window // 2)[:, None], weights.sum(-1), 0.0)
        return _combine(ring.stats, jnp.stack([weights.max(-1), weights.sum(-1), late], axis=-1))

    def _many(self, call: Call) -> tuple[jax.Array, DMSLayer, Any]:
        """Several tokens of every row: attention to each other and to the pool, which is then laid out anew."""
        window, real = self.policy.window, call.real
        tokens = Tokens(call.tokens.positions, real.astype(jnp.int32))
        known = self.ring.positions(call.length)
        ring, z, stats = self._told(call, tokens)
        evict, ends, evidence = self._leaving(ring, known, z, stats, tokens, call)
        keep = jnp.where(evict, NEGATIVE, 0.0)
        last = call.after - 1
        alive = real[:, None] & (~evict | ((last[:, None] - tokens.positions) <= window)[:, None])
        if call.fresh:
            out = attend(call.q, call.k, call.v, tokens, tokens, aligned=True, keep_bhs=keep, keep_window=window)
            pool, _, to = self.pool.rebuild(None, call.k, call.v, alive)
            slot = ring.slot
        else:
            until = self._by_entry(jnp.where((known >= 0)[:, None], ring.slot, NEVER), ends)
            out = attend_both(self.pool, call.q, call.k, call.v, tokens, keep, window, until)
            still = self.pool.there & (until > last[self.pool.row_of // call.k.shape[1]][:, None])
            pool, moved, to = self.pool.rebuild(still, call.k, call.v, alive)
            slot = moved[ring.slot]
        ring = self._renewed(ring.replace(slot=slot), Ring(to, z, stats), call)
        return out.astype(call.q.dtype), self.replace(pool=pool, ring=ring), evidence

    def _leaving(
        self, ring: Ring, known: jax.Array, z: jax.Array, stats: Any, tokens: Tokens, call: Call
    ) -> tuple[jax.Array, jax.Array, Any]:
        """What is decided about the new tokens, bool [b, h, t], the first position that does not see a token of the
        ring, i32 [b, h, R], and the evidence about what leaves the window meanwhile: first the ring's tokens, from
        the oldest on, then the new ones."""
        size, t = ring.slot.shape[-1], call.k.shape[2]
        order = (call.length[:, None] + jnp.arange(size)[None]) % size
        old = new = None
        if call.evidence is not None:
            old, new = jnp.split(jnp.pad(call.evidence, ((0, 0), (0, size), (0, 0))), [size], axis=1)
            old = jnp.zeros_like(old).at[jnp.arange(len(order))[:, None], order].set(old)
        gone, old = self._decided(ring.z, ring.stats, known, call.learned, old)
        evict, new = self._decided(z, stats, tokens.positions, call.learned, new)
        ends = jnp.where(gone, (known + size)[:, None], NEVER)
        if old is None:
            return evict, ends, None
        old = jnp.take_along_axis(old, order[..., None], axis=1)
        return evict, ends, jnp.concatenate([old, new], axis=1)[:, :t]

    def _told(self, call: Call, tokens: Tokens) -> tuple[Ring, jax.Array, Any]:
        """The ring with what the new tokens say of its own, and what is said of the new ones: logits f32 [b, h, t],
        and what they receive of each other (`_receive`)."""
        z, real = call.said, call.real
        if self.policy.late:
            # The decision of token t + 1 is about token t; none is about the last token of a row yet.
            said = jnp.concatenate([real[:, 1:], jnp.zeros_like(real[:, :1])], axis=1)
            z = jnp.where(said[:, None], shift(z, UNDECIDED), UNDECIDED)
        ring, stats = self._receive(self.ring.replace(z=self._say(call)), call, tokens)
        return ring, z, stats

    def _receive(self, ring: Ring, call: Call, tokens: Tokens) -> tuple[Ring, Any]:
        """The ring with the attention that its keys receive from the new tokens, and that of the new keys, f32
        [b, h, t, 3]; None in other forms than the observed one."""
        if ring.stats is None:
            return ring, None
        keys, places = call.k, tokens
        size, (b, h, _) = self.ring.slot.shape[-1], ring.slot.shape
        if not call.fresh:
            # From the oldest to the newest.
            order = (call.length[:, None] + jnp.arange(size)[None]) % size
            slots = _take(ring.slot, jnp.broadcast_to(order[:, None], (b, h, size)))
            keys = jnp.concatenate([self.k.reshape(-1, self.k.shape[-1])[slots], call.k.astype(self.k.dtype)], axis=2)
            before = call.length[:, None] - size + jnp.arange(size)[None]
            segments = jnp.where(before >= 0, 1, -1)
            places = Tokens(*(jnp.concatenate(x, axis=1) for x in (
                (before, tokens.positions), (segments, tokens.segments)
            )))  # fmt: skip
        stats = jnp.stack(observed.received(call.q, keys, tokens, places, self.policy.window), axis=-1)
        if call.fresh:
            return ring, stats
        back = (jnp.arange(size)[None] - call.length[:, None]) % size
        received = _take(stats[:, :, :size], jnp.broadcast_to(back[:, None], (b, h, size)))
        return ring.replace(stats=_combine(ring.stats, received)), stats[:, :, size:]

    def _by_entry(self, slot: jax.Array, ends: jax.Array) -> jax.Array:
        """i32 [p, c]: these ends at the entries `slot`, flat indices (beyond the pages: nowhere), NEVER at others."""
        pages, page = self.k.shape[:2]
        return jnp.full(pages * page, NEVER).at[slot].set(ends, mode="drop").reshape(pages, page)

    def _renewed(self, ring: Ring, new: Ring, call: Call) -> Ring:
        """The ring after the new tokens `new` [b, h, t]: theirs where they are the last R of a row."""
        positions = ring.positions(call.after)
        index = positions - call.length[:, None]
        b, h, size = ring.slot.shape
        at = jnp.broadcast_to(jnp.clip(index, 0, call.k.shape[2] - 1)[:, None], (b, h, size))
        taken = jnp.broadcast_to((index >= 0)[:, None], (b, h, size))

        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            here = taken if old.ndim == 3 else taken[..., None]
            return jnp.where(here, _take(new, at), old)

        return jax.tree.map(pick, ring, new)


def _take(x: jax.Array, at_bht: jax.Array) -> jax.Array:
    """Entries of x [b, h, s] or [b, h, s, f] at i32 [b, h, t]."""
    return jnp.take_along_axis(x, at_bht if x.ndim == 3 else at_bht[..., None], axis=2)


def _combine(old: jax.Array, new: jax.Array) -> jax.Array:
    """Statistics [..., 3] of the same keys from earlier and from later queries."""
    top = jnp.maximum(old[..., :1], new[..., :1])
    return jnp.concatenate([top, old[..., 1:] + new[..., 1:]], axis=-1)


def init(cfg: Settings, sizes: Sizes, capacity: int, n: int) -> DMSLayer:
    """Empty memories of n layers, stacked; see `policy.Policy.init`."""
    b, h, ring = sizes.b, sizes.h, cfg.window + 1
    pages = coarse(b * h * -(-capacity // cfg.page))
    layer = DMSLayer(
        Pool.empty(b, h, pages, cfg.page, sizes.k, sizes.dtype),
        Ring(
            jnp.zeros((b, h, ring), jnp.int32),
            jnp.full((b, h, ring), UNDECIDED, jnp.float32),
            jnp.zeros((b, h, ring, FEATURES), jnp.float32) if cfg.form == "observed" else None,
        ),
        cfg,
    )
    return stack_layers(layer, n)
