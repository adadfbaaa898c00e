"""Bolmo's boundary predictor, which sees one position more than it decides on (Minixhofer et al., 2025, "Bolmo:
Byteifying the Next Generation of Language Models", section 3).

A model that uses it reads prompts with it, and where units end in what it generates its decoder has to say.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.rules import cosine
from atom_jax.chunking.types import END, Boundary, Seen, Tree
from atom_jax.nn.linear import project

KIND = END
HAS_P = True
LOOKS_AHEAD = True
# The least probability of a mark.
LEAST = 5e-4


@config.register
@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Ends a unit where half the cosine distance between a projected state and the next exceeds 1/2."""

    # Factor on the cross-entropy with the marks that the data supplies.
    weight: float = 4.0

    def __post_init__(self):
        config.check(self, weight=(0, 1e6))


def spec(cfg: Lookahead, d: int) -> Tree:
    """Projections [d in, d out] of a state ("q") and of the next one ("k"), at first the identity."""
    return cosine.spec(cosine.Cosine(), d)


def init_state(cfg: Lookahead, d: int, b: int) -> tuple[()]:
    """Nothing to remember."""
    return ()


def apply(p: Tree, seen: Seen, state: tuple[()], *, cfg: Lookahead) -> tuple[Boundary, tuple[()]]:
    """END marks where p > 1/2, everything in float32. The first position of a document has p = 1, its last one in
    this call p = 0, unless it is also the first. `loss` is the weighted cross-entropy with `seen.marks` (0 without).
    """
    h_btd, tokens = seen.h.astype(jnp.float32), seen.tokens
    # As for `cosine`: accelerators' usual products flip decisions.
    with jax.default_matmul_precision("highest"):
        q_btd, k_btd = project(h_btd, p["q"].astype(jnp.float32)), project(h_btd, p["k"].astype(jnp.float32))
    near = jnp.sum(cosine.direction(q_btd) * jnp.roll(cosine.direction(k_btd), -1, axis=1), axis=-1)
    prob = jnp.maximum((1 - near) / 2, LEAST)
    real, first, last = tokens.segments > 0, tokens.positions == 0, last_of_document(seen)
    prob = jnp.where(real & first, 1.0, jnp.where(last, 0.0, prob))
    # A mark is chance at p = 1/2: the comparison is with the cosine, which has no rounding in between.
    mark = real & (first | (~last & (near < 0)))
    loss = 0.0 if seen.marks is None else cfg.weight * cross_entropy(prob, seen.marks | first, real & ~last)
    return Boundary(mark, p=prob, loss=jnp.float32(loss), kind=END), state


def last_of_document(seen: Seen) -> jax.Array:
    """bool [b, t]: the position is the last of its document in this call, or padding."""
    tokens = seen.tokens
    same = (tokens.segments == jnp.roll(tokens.segments, -1, axis=1)) & (jnp.roll(tokens.positions, -1, axis=1) > 0)
    same = same & (jnp.arange(same.shape[1]) < same.shape[1] - 1)[None]
    return ~same | (tokens.segments == 0)


def cross_entropy(p_bt: jax.Array, mark_bt: jax.Array, counts_bt: jax.Array) -> jax.Array:
    """Mean over `counts_bt` of the cross-entropy between marks and their probabilities, f32 []; log-probabilities of
    marks are at most -0.001, as published."""
    log_p = jnp.minimum(jnp.log(jnp.maximum(p_bt, LEAST)), -1e-3)
    nats = -jnp.where(mark_bt, log_p, jnp.log(-jnp.expm1(log_p)))
    return jnp.sum(jnp.where(counts_bt, nats, 0.0)) / jnp.maximum(jnp.sum(counts_bt), 1)
