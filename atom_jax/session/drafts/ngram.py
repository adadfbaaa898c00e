"""Drafts copied from the row's own text: prompt lookup (Saxena, 2023), the n-gram half of ANPD (Ou et al., 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from atom_jax import config
from atom_jax.session.drafts.drafter import Draft, Drafter, Model, Text


@dataclasses.dataclass(frozen=True)
class NGram(Drafter):
    """The longest end of a row, of at most `longest` tokens and at least `least`, is looked for further up in the
    row; what followed it there, the newest time of the longest ones, is the draft.

    A draft that reaches the end of the row goes on with its own beginning: a text that repeats itself goes on doing
    so. (In the papers it ends there. ANPD keeps counts of n-grams; here the newest one counts.)
    """

    name: ClassVar[str] = "ngram"
    longest: int = 4
    least: int = 2

    def __post_init__(self):
        config.check(self, longest=(1, 64), least=(1, self.longest))

    def propose(self, state: Any, text: Text, n: int, model: Model | None = None) -> Draft:
        """See `Drafter`."""
        (b, t), at, last = text.ids.shape, jnp.arange(text.ids.shape[1])[None], text.length[:, None] - 1
        same = at < last
        length_bt = jnp.zeros((b, t), jnp.int32)
        for back in range(self.longest):
            token = jnp.take_along_axis(text.ids, jnp.maximum(last - back, 0), axis=1)
            before = jnp.pad(text.ids, ((0, 0), (back, 0)))[:, :t]
            same &= (before == token) & (at >= back)
            length_bt += same
        score_bt = jnp.where(length_bt >= self.least, length_bt * t + at, -1)
        best = jnp.argmax(score_bt, axis=1)[:, None]
        there = best + 1 + jnp.arange(n)[None] % jnp.maximum(last - best, 1)
        tokens = jnp.take_along_axis(text.ids, jnp.minimum(there, t - 1), axis=1)
        return Draft(tokens, jnp.where(score_bt.max(1) >= 0, n, 0))
