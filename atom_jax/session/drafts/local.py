"""Drafts of models with units of their own, by the layers around the units alone."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax.session.drafts.drafter import Draft, Drafter, Model, Text


@dataclasses.dataclass(frozen=True)
class Local(Drafter):
    """The encoder and the decoder of the outermost stage go on with the newest unit as it is (`Family.stale`). Up to
    the byte that begins or ends a unit they say what the model says; beyond they guess, and one call of the networks
    inside then does for several units. In models that have no such layers there are no drafts."""

    name: ClassVar[str] = "local"

    def propose(self, state: Any, text: Text, n: int, model: Model | None = None) -> Draft:
        """See `Drafter`."""
        b = len(text.ids)
        if model is None or model.stale is None:
            return Draft(jnp.zeros((b, n), jnp.int32), jnp.zeros(b, jnp.int32))

        def one(carry: tuple, i: jax.Array) -> tuple:
            x_bd, memory = model.stale(carry[1], carry[0])
            token_b = model.choose(model.logits(x_bd), i)
            return (token_b, memory), token_b

        found_nb = jax.lax.scan(one, (text.last, model.begin()), jnp.arange(n))[1]
        return Draft(found_nb.T, jnp.full(b, n, jnp.int32))
