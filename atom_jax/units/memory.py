"""What a stage remembers of every row besides its encoder and decoder: an open unit, and the latest position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.chunking import pooling, rules
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.types import Boundary, Plan, PlanState
from atom_jax.kvcache.memory import Memory


@struct.dataclass
class Latest:
    """The latest position of rows in which the encoder alone has seen it. What is kept of others means nothing.

    on: bool [b], rows that wait: their position begins or ends a unit, and nothing inside has run for it.
    h: [b, 1, d] encoder states. u: [b, 1, k, d] the units' vectors. boundary, plan: of this one position.
    undecided: bool [b], rows whose rule has yet to see the position that follows; ids: i32 [b, 1], its token ids;
    x: [b, 1, d] the final states of the latest position that all layers have seen. All None where the rule does not
    look ahead.
    """

    on: jax.Array
    h: jax.Array
    u: jax.Array
    boundary: Boundary
    plan: Plan
    undecided: jax.Array | None = None
    ids: jax.Array | None = None
    x: jax.Array | None = None

    @classmethod
    def none(cls, chunking: Chunking, d: int, b: int, dtype: Any) -> Latest:
        """Before the first position of b rows."""
        rule, no = rules.of(chunking.rule), jnp.zeros((b, 1), bool)
        p = jnp.zeros((b, 1), jnp.float32) if getattr(rule, "HAS_P", False) else None
        h, u = jnp.zeros((b, 1, d), dtype), jnp.zeros((b, 1, chunking.slots, d), dtype)
        ahead = (no[:, 0], no.astype(jnp.int32), h) if rules.looks_ahead(chunking.rule) else (None, None, None)
        return cls(no[:, 0], h, u, Boundary(no, p, loss=None, kind=rule.KIND), Plan.empty(b, 1, 1), *ahead)

    @property
    def behind(self) -> jax.Array:
        """i32 [b]: positions that the encoder has seen and the decoder has not."""
        return (self.on if self.undecided is None else self.on | self.undecided).astype(jnp.int32)


@struct.dataclass
class Parts:
    """rule, plan (`PlanState`), pool: the states of these parts of a stage. newest: f32 [b, k, d], the newest unit as
    it came back. inside: the memory of what is inside. latest: of a stage whose rows may wait. port: what the model
    itself keeps of what it read."""

    rule: Any = None
    plan: PlanState | None = None
    pool: Any = None
    newest: jax.Array | None = None
    inside: Memory | None = None
    latest: Latest | None = None
    port: Any = None

    @classmethod
    def empty(cls, chunking: Chunking, d: int, b: int, dtype: Any, **others: Any) -> Parts:
        """Before the first position of b rows, for states of width d."""
        return cls(
            rules.of(chunking.rule).init_state(chunking.rule, d, b),
            PlanState.empty(b),
            pooling.POOLS[chunking.pool].init_state(chunking, d, b, dtype),
            jnp.zeros((b, chunking.slots, d), jnp.float32),
            **others,
        )
