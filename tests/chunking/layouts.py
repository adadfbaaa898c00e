"""Rows of documents with marks, and plans, for the tests of chunking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.chunking import plan
from atom_jax.chunking.types import END, START, Boundary, PlanState
from atom_jax.nn.attention import Tokens

make_plan = functools.partial(jax.jit, static_argnames=("m", "official", "null"))(plan.make_plan)


def tokens(*rows: list[int], t: int, left: bool = False) -> Tokens:
    """One row of t places per list of document lengths; padding on the right, or on the left."""
    positions, segments = np.zeros((2, len(rows), t), np.int32)
    for b, lengths in enumerate(rows):
        n = sum(lengths)
        row = slice(t - n, t) if left else slice(0, n)
        positions[b, row] = np.concatenate([np.arange(x) for x in lengths] or [[]])
        segments[b, row] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return Tokens(jnp.asarray(positions), jnp.asarray(segments))


def random_marks(key: int, kind: str, where: Tokens, rate: float = 0.4, forced: bool = True) -> jax.Array:
    """Independent marks; for "start" rules (unless not forced) every document's first position is one."""
    mark = jax.random.bernoulli(jax.random.key(key), rate, where.positions.shape)
    if kind == START and forced:
        mark = mark | (where.positions == 0)
    return mark & (where.segments > 0)


def plan_of(mark: jax.Array, where: Tokens, kind: str = END, m: int | None = None, **more):
    """Boundary and plan of rows that nothing came before."""
    boundary = Boundary(mark=mark, kind=kind)
    made, _ = make_plan(boundary, where, m or mark.shape[1], PlanState.empty(mark.shape[0]), **more)
    return boundary, made
