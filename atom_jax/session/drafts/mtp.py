"""Drafts of multi-token heads, which were trained for the model (`models.mtp`)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.models import mtp
from atom_jax.session.drafts.drafter import Draft, Drafter, Model, Read, Text
from atom_jax.typing import AtomError


@struct.dataclass
class Latest:
    """The final state [b, d] from which the newest token of every row was chosen; known: bool [b], whether there is
    one."""

    x: jax.Array
    known: jax.Array


@dataclasses.dataclass(frozen=True)
class MTP(Drafter):
    """heads: a directory of heads, or the WORKDIR of a run that trained some (`checkpoint.heads`).

    Every head's token is chosen as the model's will be, with the same noise where it is drawn (the coupling of
    Gumbel noise): where a head says what the model says, it draws the same token.
    """

    name: ClassVar[str] = "mtp"
    heads: str = ""

    def __post_init__(self):
        if not self.heads:
            raise AtomError("draft mtp: which heads? Expected mtp:heads=PATH")

    @property
    def source(self) -> str:
        """See `Drafter`."""
        return self.heads

    def reach(self, learned: Any) -> int:
        """One token of every head."""
        return mtp.count(learned)

    def init(self, text: Text, vocab: int, learned: Any = None) -> Latest:
        """No state is known yet."""
        b, down = len(text.ids), learned["down"]
        return Latest(jnp.zeros((b, down.shape[-1]), down.dtype), jnp.zeros(b, bool))

    def propose(self, state: Latest, text: Text, n: int, model: Model | None = None) -> Draft:
        """See `Drafter`."""
        m = min(n, mtp.count(model.learned))

        def choose(x_bd: jax.Array, k: jax.Array) -> jax.Array:
            return model.choose(model.logits(x_bd), k)

        found_bm = mtp.chain(model.learned, state.x, text.last, m, model.embed, choose)
        return Draft(jnp.pad(found_bm, ((0, 0), (0, n - m))), jnp.where(state.known, m, 0))

    def observe(self, state: Latest, read: Read) -> Latest:
        """See `Drafter`."""
        at = jnp.maximum(read.taken - 1, 0)[:, None, None]
        newest_bd = jnp.take_along_axis(read.x, at, axis=1)[:, 0].astype(state.x.dtype)
        some = read.taken > 0
        return Latest(jnp.where(some[:, None], newest_bd, state.x), state.known | some)
