"""The interface of drafters, which guess how a text goes on, so that the model reads several tokens in one call.

A drafter is a frozen configuration with a name; what it remembers is a pytree of its own. It can't change a text: a
token of a draft stays where it is the one that is chosen without it (`drafts.loop`). Adding one is one file and one
line in `drafts.drafters`. What one has learned for a model is kept apart, as arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Text:
    """What is written of every row, the token that was chosen last included. ids: i32 [b, t], padded on the right;
    length: i32 [b]."""

    ids: jax.Array
    length: jax.Array

    @property
    def last(self) -> jax.Array:
        """i32 [b]: the newest token of every row."""
        return jnp.take_along_axis(self.ids, self.length[:, None] - 1, axis=1)[:, 0]

    def add(self, tokens_bn: jax.Array, count_b: jax.Array) -> Text:
        """With the first count_b, i32 [b], of n further tokens of every row; those beyond the end are lost."""
        offsets, t = jnp.arange(tokens_bn.shape[1])[None], self.ids.shape[1]
        at = jnp.where(offsets < count_b[:, None], self.length[:, None] + offsets, t + offsets)
        rows = jnp.arange(len(self.ids))[:, None]
        return Text(self.ids.at[rows, at].set(tokens_bn, mode="drop", unique_indices=True), self.length + count_b)


@struct.dataclass
class Draft:
    """Guesses at the next tokens of every row, one after another: i32 [b, n], of which the first `count`, i32 [b],
    are meant."""

    tokens: jax.Array
    count: jax.Array


@struct.dataclass
class Read:
    """What the model has read in a call: ids i32 [b, n], one after another, of which the first `count`, i32 [b], are
    real, and the first `taken`, i32 [b], stay; and what it says after each of them, logits f32 [b, n, v] of final
    states x [b, n, d]."""

    ids: jax.Array
    count: jax.Array
    logits: jax.Array
    x: jax.Array
    taken: jax.Array


@dataclasses.dataclass(frozen=True)
class Model:
    """The model whose texts are drafted, as far as a drafter asks it.

    learned: the drafter's own arrays (`Drafter.source`), or None. embed: tokens i32 [b] -> [b, d]. logits: final
    states [b, d] -> f32 [b, v]. choose: (logits f32 [b, v], i) -> tokens i32 [b], those that are chosen from such
    logits as number i, from 0, after the newest ones. stale: (memory, tokens i32 [b]) -> (final states [b, d],
    memory), `Family.stale` of one further token, first with the memory of begin(); None where there is none.
    """

    learned: Any
    embed: Callable[[jax.Array], jax.Array]
    logits: Callable[[jax.Array], jax.Array]
    choose: Callable[[jax.Array, Any], jax.Array]
    begin: Callable[[], Any] | None = None
    stale: Callable[[Any, jax.Array], tuple[jax.Array, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base of all drafters' configurations. name: as in `generate(..., draft=name)`."""

    name: ClassVar[str] = ""

    @property
    def source(self) -> str:
        """Where that lies which it has learned (`checkpoint.heads`); "" where it learns nothing beforehand."""
        return ""

    def reach(self, learned: Any) -> int | None:
        """The most tokens that a draft can have; None: any number."""
        return None

    def init(self, text: Text, vocab: int, learned: Any = None) -> Any:
        """What is remembered before the first call: arrays [b, ...]. vocab: number of ids. learned: see `Model`."""
        return ()

    def propose(self, state: Any, text: Text, n: int, model: Model | None = None) -> Draft:
        """How the rows may go on; at most n tokens each. model: for drafters that ask it."""
        raise NotImplementedError

    def observe(self, state: Any, read: Read) -> Any:
        """What is remembered after a call of the model."""
        return state
