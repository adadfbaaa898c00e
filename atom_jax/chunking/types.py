"""What boundary rules, chunk layouts, pools and upsamplers pass to each other.

A boundary rule marks positions; a plan turns marks into a layout of at most m chunks; a pool makes a vector or
several of each chunk; a network runs over the chunks; their outputs are mixed and brought back to the positions.
Every function takes a call's positions and a state that earlier calls left (the beginning of a chunk that is still
open, for example), so that reading a text at once or byte by byte is one code path.

Dimension letters besides those of `atom_jax.typing`: m chunks, k vectors ("slots") per chunk, d width of positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

START, END = "start", "end"


@struct.dataclass
class Seen:
    """What a boundary rule may look at.

    h:      [b, t, d] states of the positions; entry t depends on positions up to t only.
    tokens: Tokens [b, t]; position 0 begins a document, segment 0 is padding (after the real positions of a row).
    ids:    i32 [b, t] token ids; in deeper stages, whose positions are chunks, `Plan.ids` of these; or None.
    marks:  bool [b, t] unit ends that the data supplies (targets of supervised rules), or None.
    key:    PRNG key while training; None turns noise off.
    changed: f32 [b, t] share of what a position holds that differs from the one before, 1 of a document's first;
            None where that means nothing.
    deep:   static: the positions are chunks.
    """

    h: jax.Array
    tokens: Tokens
    ids: jax.Array | None = None
    marks: jax.Array | None = None
    key: jax.Array | None = None
    changed: jax.Array | None = None
    deep: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Boundary:
    """Where a rule ends or starts units.

    mark:  bool [b, t]; never True at padding.
    p:     f32 [b, t] probability of a mark, or None where the rule has none.
    logit: f32 [b, t] the same before the sigmoid, or None.
    hard:  f32 [b, t] equal to mark, with a gradient for the rule (straight-through), or None.
    loss:  f32 [] the rule's own weighted loss (0 without one).
    kind:  "start": a marked position is the first of its chunk, which may be read from there on;
           "end": it is the last of its chunk, which may be read from there on.
    """

    mark: jax.Array
    p: jax.Array | None = None
    logit: jax.Array | None = None
    hard: jax.Array | None = None
    loss: jax.Array | float = 0.0
    kind: str = struct.field(pytree_node=False, default=END)


@struct.dataclass
class Plan:
    """The layout of at most m chunks per row, in static shapes.

    slot:      i32 [b, t] in [0, m], never decreasing: the chunk that a position belongs to. m = none of them.
    member:    bool [b, t]: the position really is in chunk `slot` (not padding, not the unfinished end of an earlier
               document, not beyond the capacity).
    tail:      bool [b, t]: the position is in the chunk that is still open after this call ("end" rules).
    offset:    i32 [b, t]: index of the position within its own chunk, earlier calls included.
    at:        i32 [b, m]: position (index into t) of the chunk's mark; 0 in unused slots.
    read:      i32 [b, t] in [-1, m - 1]: the latest chunk of the same document that the position may read;
               -1 = the state of earlier calls, which at a document's beginning is "nothing".
    tokens:    Tokens [b, m]: index of each chunk within its document, and its document; segment 0 = unused slot.
    continues: bool [b]: chunk 0 began in an earlier call.
    null:      bool [b, m]: the chunk that begins a document and holds nothing.
    count:     i32 [b] marks in this call (with the chunks that hold nothing).
    lost:      i32 [b] marks beyond the capacity, whose positions stay in chunk m - 1 ("start") or are read by nobody
               ("end").
    ids:       i32 [b, m]: the token id at the chunk's mark, -1 of one that holds nothing; None where ids are unknown.
    """

    slot: jax.Array
    member: jax.Array
    tail: jax.Array
    offset: jax.Array
    at: jax.Array
    read: jax.Array
    tokens: Tokens
    continues: jax.Array
    count: jax.Array
    lost: jax.Array
    null: jax.Array
    ids: jax.Array | None = None

    @classmethod
    def empty(cls, b: int, t: int, m: int) -> Plan:
        """No chunks at all."""
        i_bt, i_bm, i_b = (jnp.zeros(shape, jnp.int32) for shape in ((b, t), (b, m), (b,)))
        no_bt, no_bm, no_b = (i > 0 for i in (i_bt, i_bm, i_b))
        return cls(i_bt, no_bt, no_bt, i_bt, i_bm, i_bt - 1, Tokens(i_bm, i_bm), no_b, i_b, i_b, no_bm, i_bm)


@struct.dataclass
class PlanState:
    """What a plan remembers: chunks i32 [b], marked so far in the document (marks beyond the capacity are none);
    open i32 [b], positions in the chunk that is still open (for "start" rules: with the mark itself)."""

    chunks: jax.Array
    open: jax.Array

    @classmethod
    def empty(cls, b: int) -> PlanState:
        """Before the first position."""
        return cls(jnp.zeros(b, jnp.int32), jnp.zeros(b, jnp.int32))


def last_real(x: jax.Array, tokens: Tokens, old: jax.Array) -> jax.Array:
    """The last real entry of every row of x [b, t, ...], or old [b, ...] where all t are padding."""
    last = last_index(tokens)
    found = jnp.take_along_axis(x, jnp.maximum(last, 0).reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
    return jnp.where(last.reshape(-1, *[1] * (x.ndim - 2)) >= 0, found, old)


def last_index(tokens: Tokens) -> jax.Array:
    """i32 [b]: index of the last real position of every row, -1 where all are padding."""
    index = jnp.arange(tokens.segments.shape[1], dtype=jnp.int32)[None]
    return jnp.max(jnp.where(tokens.segments > 0, index, -1), axis=1)


def previous(x: jax.Array, old: jax.Array) -> jax.Array:
    """x [b, t, ...] one position later: entry t is x at t - 1, entry 0 is `old` [b, ...]."""
    return jnp.concatenate([old[:, None].astype(x.dtype), x[:, :-1]], axis=1)


def ids_of(seen: Seen, rule: str) -> jax.Array:
    """The token ids i32 [b, t]. Raises AtomError in a stage whose positions are chunks."""
    if seen.ids is None or seen.deep:
        raise AtomError(f"rule: {rule} reads token ids, so it can only cut the outermost stage")
    return seen.ids


Tree = Any
