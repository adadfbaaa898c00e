"""Drafts from the text where it repeats itself, and from the model's habits beyond, after Goose."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from atom_jax.session.drafts.drafter import Draft, Model, Text
from atom_jax.session.drafts.ngram import NGram
from atom_jax.session.drafts.recycle import Recycle, follow


@dataclasses.dataclass(frozen=True)
class Spine(Recycle):
    """The draft of `ngram` where it finds one, else that of `recycle`.

    As recalled, the paper's n-gram matches are the spine of a tree whose branches are candidates for other tokens;
    here there is one chain.
    """

    name: ClassVar[str] = "spine"
    longest: int = 4
    least: int = 2

    def __post_init__(self):
        self._ngram  # noqa: B018 (checks the fields)

    @property
    def _ngram(self) -> NGram:
        return NGram(self.longest, self.least)

    def propose(self, state: jax.Array, text: Text, n: int, model: Model | None = None) -> Draft:
        """See `Drafter`."""
        found = self._ngram.propose((), text, n)
        return follow(state, text.last, found.tokens, found.count)
