"""StreamingLLM (Xiao et al., 2023): the first tokens of a text and the newest ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import Budget
from atom_jax.kvcache.layer import Call


@config.register
@dataclasses.dataclass(frozen=True)
class StreamingLLM(Budget):
    """Keeps `sinks` entries at the start and the most recent ones. Keys keep the positions that they were computed
    at (the paper also moves them together)."""

    name: ClassVar[str] = "streaming_llm"
    sinks: int = 4

    def token_score(self, call: Call) -> jax.Array:
        """The position."""
        position = call.tokens.positions.astype(jnp.float32)
        return jnp.broadcast_to(position[:, None], call.k.shape[:3])
