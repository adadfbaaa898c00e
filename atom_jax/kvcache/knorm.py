"""Key norms (Devoto et al., 2024): keys of small norm tend to be the ones attended to."""

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
class KNorm(Budget):
    """Score: minus the Euclidean norm of the key. In a first layer, or after a norm on keys, these are equal but for
    rounding, and for the epsilon of the norm, which takes a digit more (docs/reliability.md, "Digits")."""

    name: ClassVar[str] = "knorm"
    digits: ClassVar[int] = 13

    def token_score(self, call: Call) -> jax.Array:
        """Minus the norm."""
        return -jnp.linalg.norm(call.k.astype(jnp.float32), axis=-1)
