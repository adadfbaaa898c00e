"""Random eviction: what any other policy has to beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from atom_jax import config
from atom_jax.kvcache.budget import Budget
from atom_jax.kvcache.layer import Call


@config.register
@dataclasses.dataclass(frozen=True)
class RandomPolicy(Budget):
    """Score: uniform, drawn from seed, layer, position and head, so that a row gets the same in any batch."""

    name: ClassVar[str] = "random"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"seed": (0, 2**31 - 1)}
    seed: int = 0

    def token_score(self, call: Call) -> jax.Array:
        """A draw for every token and head."""
        key = jax.random.fold_in(jax.random.key(self.seed), call.layer)
        positions, (_, h, _) = call.tokens.positions, call.k.shape[:3]
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (h,)))
        return draw(positions.reshape(-1)).reshape(*positions.shape, h).transpose(0, 2, 1)
