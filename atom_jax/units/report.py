"""What the stages decided, in terms of the outermost positions, and losses that come from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.chunking import rules
from atom_jax.chunking.config import Chunking
from atom_jax.nn.attention import Tokens
from atom_jax.typing import Batch
from atom_jax.units.stage import Note, Notes


def report(notes: Notes, batch: Batch, chunking: tuple[Chunking, ...]) -> dict[str, Any]:
    """aux of a model: memory (`Notes.memory`), where there is any; and with units boundaries (bool [b, t] per stage,
    outermost first: where units end or start), boundary_probs (float32 [b, t] per stage; 0 where the stage decides
    nothing), loss (float32 [], the rules' own), lost (i32 [], marks for which there was no slot), metrics (name ->
    float32 [2], a sum and what it is to be divided by), and, for a rule whose loss needs the model's output, late
    (for `late_loss`)."""
    memory = {"memory": notes.memory} if any(notes.memory) else {}
    if not notes.units:
        return memory
    shape, real = batch.segments.shape, batch.segments > 0
    boundaries, probs, metrics = [], [], {}
    loss, lost, units = jnp.float32(0), jnp.int32(0), jnp.sum(real, dtype=jnp.float32)
    for s, note in enumerate(notes.units):
        mark, p = _outside(notes.units[:s], note)
        boundaries.append(mark.reshape(shape) & real)
        probs.append(jnp.where(real, p.reshape(shape), 0.0))
        count = jnp.sum(boundaries[-1], dtype=jnp.float32)
        metrics[f"bytes_per_unit_{s}"] = jnp.stack([jnp.sum(real, dtype=jnp.float32), count])
        missed = jnp.sum(note.plan.lost)
        metrics[f"lost_{s}"] = jnp.stack([missed.astype(jnp.float32), jnp.maximum(units, 1.0)])
        if isinstance(note.boundary.loss, jax.Array):
            metrics[f"rule_loss_{s}"] = jnp.stack([note.boundary.loss * units, units])
        units, loss, lost = count, loss + note.boundary.loss, lost + missed
    found = {"boundaries": tuple(boundaries), "boundary_probs": tuple(probs), "loss": loss, "lost": lost}
    if rules.late(chunking[0].rule):
        # Rows may have been packed side by side.
        found["late"] = jax.tree.map(lambda a: a.reshape(shape), notes.units[0].boundary.replace(loss=None))
    return found | {"metrics": metrics} | memory


def late_loss(aux: dict[str, Any], entropy_bt: jax.Array, batch: Batch, chunking: tuple[Chunking, ...]) -> jax.Array:
    """What is to be added to aux["loss"], f32 [], where aux has "late". entropy_bt: f32 [b, t], nats, of the model's
    distributions of the token after each position."""
    rule, tokens = chunking[0].rule, Tokens(batch.positions, batch.segments)
    return rules.of(rule).late_loss(aux["late"], entropy_bt, tokens, cfg=rule)


def _outside(outer: tuple[Note, ...], note: Note) -> tuple[jax.Array, jax.Array]:
    """Marks bool and their probabilities f32, in the outermost stage's positions."""
    mark, p = note.boundary.mark, note.boundary.p
    p = mark.astype(jnp.float32) if p is None else p
    for one in reversed(outer):
        # A unit of an inner stage begins or ends where the chunk that it marks was marked in the stage outside.
        chunk = jnp.minimum(one.plan.slot, one.plan.at.shape[1] - 1)
        ours = one.boundary.mark & one.plan.member
        take = lambda a, chunk=chunk: jnp.take_along_axis(a.reshape(chunk.shape[0], -1), chunk, axis=1)  # noqa: E731
        # Marks beyond the capacity made no chunk.
        ours &= take(one.plan.at) == jnp.arange(chunk.shape[1])[None]
        mark, p = take(mark) & ours, jnp.where(ours, take(p), 0.0)
    return mark, p
