"""Drafts from what the model said last time after the same token: Token Recycling (Luo et al., 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.session import sampling
from atom_jax.session.drafts.drafter import Draft, Drafter, Model, Read, Text


@dataclasses.dataclass(frozen=True)
class Recycle(Drafter):
    """Every row has a table of the token that the model found likeliest when it last read each token (rejected drafts
    count, too); a draft follows it from the newest token on.

    The paper keeps several candidates per token, which make a tree, in one table for all texts, and starts with that
    of the text before. Here the draft is the chain of the first candidates, and a row starts with what followed each
    token in its prompt.
    """

    name: ClassVar[str] = "recycle"

    def init(self, text: Text, vocab: int, learned: Any = None) -> jax.Array:
        """The table, i32 [b, v]; -1: nothing is known."""
        table = np.full((len(text.ids), vocab), -1, np.int32)
        for row, ids, length in zip(table, np.asarray(text.ids), np.asarray(text.length)):
            row[ids[: length - 1]] = ids[1:length]
        return jnp.asarray(table)

    def propose(self, state: jax.Array, text: Text, n: int, model: Model | None = None) -> Draft:
        """See `Drafter`."""
        return follow(state, text.last, jnp.zeros((len(text.ids), n), jnp.int32), jnp.zeros_like(text.length))

    def observe(self, state: jax.Array, read: Read) -> jax.Array:
        """See `Drafter`."""
        b, n = read.ids.shape
        likeliest = sampling.greedy(read.logits.reshape(b * n, -1)).reshape(b, n)
        at = jnp.where(jnp.arange(n)[None] < read.count[:, None], read.ids, state.shape[1])
        return state.at[jnp.arange(b)[:, None], at].set(likeliest, mode="drop")


def follow(table_bv: jax.Array, token_b: jax.Array, tokens_bn: jax.Array, count_b: jax.Array) -> Draft:
    """The draft whose first count_b, i32 [b], tokens are given, and which goes on as the table has it. token: i32
    [b], the one before."""

    def one(token_b: jax.Array, place: tuple) -> tuple[jax.Array, jax.Array]:
        given_b, i = place
        known_b = jnp.take_along_axis(table_bv, jnp.maximum(token_b, 0)[:, None], axis=1)[:, 0]
        token_b = jnp.where(i < count_b, given_b, jnp.where(token_b < 0, -1, known_b))
        return token_b, token_b

    n = tokens_bn.shape[1]
    found_bn = jax.lax.scan(one, token_b, (tokens_bn.T, jnp.arange(n)))[1].T
    return Draft(jnp.maximum(found_bn, 0), jnp.sum(found_bn >= 0, axis=1, dtype=jnp.int32))
