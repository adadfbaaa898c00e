"""SnapKV (Li et al., 2024): what the end of the prompt attends to stays."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, Entries
from atom_jax.kvcache.layer import Call
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class SnapKV(Budget):
    """Score: attention of the last `window` queries of the prompt to the keys before them, averaged over queries,
    over `pool` neighbouring keys and over the heads of the group.

    The window itself stays; where the limit is smaller, or the whole prompt lies in the window, the newest entries
    do. Tokens after the prompt are stored at the cost of the prompt's keys, the least first; once these are gone, of
    the oldest.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 64
    pool: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise AtomError(f"memory {self.name}: expected window of at least 1 and an odd pool")

    def prompt(self, entries: Entries, call: Call) -> jax.Array:
        """Pooled attention of the window; +inf inside it."""
        t = entries.pos.shape[2]
        q, at = observe.last_queries(call, min(self.window, t))
        first = call.after[:, None, None] - self.window
        before = jnp.broadcast_to(jnp.arange(t)[None, None] < first, entries.pos.shape)
        score = observe.weights(q, at, entries.k, entries.pos, None, call.window).mean((2, 3))
        score = jnp.pad(jnp.where(before, score, 0.0), ((0, 0), (0, 0), (self.pool // 2, self.pool // 2)))
        pooled = sum(score[..., i : i + t] for i in range(self.pool)) / self.pool
        return jnp.where(before, pooled, jnp.inf)
