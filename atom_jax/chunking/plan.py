"""From marked positions to a layout of at most m chunks per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.chunking.segments import gather, scatter_unique
from atom_jax.chunking.types import START, Boundary, Plan, PlanState, last_real
from atom_jax.nn.attention import Tokens


def make_plan(
    boundary: Boundary, tokens: Tokens, m: int, state: PlanState, official: bool = False, null: bool = False
) -> tuple[Plan, PlanState]:
    """Lays out the chunks that this call's marks begin or end; for "end" rules positions after the last mark wait
    for a later call. Which chunks exist at a position depends on nothing after it: of more than m marks in a row the
    first m count, and `Plan.lost` counts the others.

    Args:
      boundary: marks bool [b, t] and their kind. tokens: the positions, Tokens [b, t].
      m: chunks per row that there is room for, at least 1. state: what the calls before left.
      official: fill unused slots with the unmarked positions in order, and call them real: H-Net's published code
        averages its ratio loss over such slots (arXiv 2507.07955, `goombalab/hnet`, padded mode). Only for
        comparison with it, in rows of one document.
      null: for "end" rules, every document begins with a chunk of no positions, which its positions read until its
        first mark (the null group of dynamic token pooling, arXiv 2211.09761).
    Returns: the plan, and the state after this call, in which only marks that have a slot count as chunks.
    """
    start = boundary.kind == START
    real = tokens.segments > 0
    mark, begins = boundary.mark & real, real & (tokens.positions == 0)
    i = jax.lax.broadcasted_iota(jnp.int32, mark.shape, 1)

    marks_to = jnp.cumsum(mark, axis=1, dtype=jnp.int32)
    waits = marks_to - mark == marks_to[:, -1:]
    empty = begins if null else jnp.zeros_like(begins)
    empty_to = jnp.cumsum(empty, axis=1, dtype=jnp.int32)
    marks_to = marks_to + empty_to
    marks_before, count = marks_to - mark, marks_to[:, -1]
    kept = mark & (marks_to <= m)
    to, before = jnp.minimum(marks_to, m), jnp.minimum(marks_before, m)

    # Chunks of the row that belong to earlier documents; negative: chunks of this document in earlier calls.
    base = _latest(begins, jnp.minimum(marks_before - empty, m), -state.chunks)
    read = jnp.where(real & (to > jnp.maximum(base, 0)), to - 1, -1)
    at, positions, segments = _chunks(tokens, mark, kept, marks_to, to - base, m, official)
    is_empty = jnp.zeros_like(at, bool)
    if null:
        # A document's empty chunk and a mark at its first position share that position.
        fits = empty & (marks_before <= m)
        is_empty = scatter_unique(empty, marks_before - 1, fits, m)
        at = at + scatter_unique(i, marks_before - 1, fits, m)
        segments = jnp.where(is_empty, gather(tokens.segments, at), segments)
        positions = jnp.where(is_empty, 0, positions)

    if start:
        slot, new = jnp.maximum(to - 1, 0), begins | kept
        member, tail = read >= 0, jnp.zeros_like(mark)
        continues = jnp.zeros_like(count, bool)
    else:
        slot, new = jnp.where(waits, m, before), begins | jnp.pad(mark[:, :-1], ((0, 0), (1, 0)))
        owner = gather(segments, jnp.minimum(slot, m - 1))
        member = real & (slot < m) & (owner == tokens.segments)
        tail = real & waits & (tokens.segments == jnp.max(tokens.segments, axis=1, keepdims=True))
        continues = (state.open > 0) & ~jnp.any(begins, axis=1)
    offset = jnp.where(real, i - _latest(new, i, -state.open), 0)

    after = PlanState(
        chunks=last_real(to - base, tokens, state.chunks),
        open=last_real(offset + 1 if start else jnp.where(mark, 0, offset + 1), tokens, state.open),
    )
    lost = jnp.maximum(count - m, 0)
    return Plan(
        slot, member, tail, offset, at, read, Tokens(positions, segments), continues, count, lost, is_empty
    ), after


def _chunks(
    tokens: Tokens,
    mark: jax.Array,
    kept: jax.Array,
    marks_to: jax.Array,
    nth: jax.Array,
    m: int,
    official: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """i32 [b, m] each: the position of the mark, the index within the document and the document of every chunk.
    nth i32 [b, t]: chunks of the document up to and including a position, earlier calls included."""
    i = jax.lax.broadcasted_iota(jnp.int32, mark.shape, 1)
    j = jax.lax.broadcasted_iota(jnp.int32, (mark.shape[0], m), 1)
    count = marks_to[:, -1:]
    used = j < count
    if official:
        rank = jnp.where(mark, marks_to, count + jnp.cumsum(~mark, axis=1, dtype=jnp.int32)) - 1
        at = scatter_unique(i, rank, rank < m, m)
    else:
        at = scatter_unique(i, marks_to - 1, kept, m)
    positions = jnp.where(used, gather(nth, at) - 1, 0)
    segments = jnp.where(used, gather(tokens.segments, at), 0)
    if official:
        positions = jnp.where(used, positions, nth[:, -1:] + j - count)
        segments = jnp.where(used, segments, jnp.max(tokens.segments, axis=1, keepdims=True))
    return at, positions, segments


def _latest(where: jax.Array, value: jax.Array, default: jax.Array) -> jax.Array:
    """value [b, t] at the latest position at or before each where `where` holds, or default [b], which is the
    smallest; values never decrease along t."""
    default = jnp.broadcast_to(default[:, None], value.shape)
    return jax.lax.cummax(jnp.where(where, value, default), axis=1)
