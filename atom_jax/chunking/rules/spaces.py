"""Units that end at spaces."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import END, Boundary, Seen, Tree, ids_of, last_real, previous
from atom_jax.typing import AtomError

KIND = END


@config.register
@dataclasses.dataclass(frozen=True)
class Spaces:
    """Ends a unit at bytes of some class."""

    # "whitespace": every byte in `characters` (the baseline of dynamic token pooling, Nawrot et al., 2023).
    # "spacebyte": a space-like byte that follows one that is not (SpaceByte, Slagle, 2024; BLT's space patches):
    # a word and the one space-like byte after it are a unit, known at that byte and readable from there on.
    style: str = "whitespace"
    # Ids that end a unit ("whitespace").
    characters: tuple[int, ...] = (0x20,)

    def __post_init__(self):
        config.check(self, characters=(0, 2**28))
        if self.style not in ("whitespace", "spacebyte"):
            raise AtomError(f"style: expected whitespace or spacebyte, got {self.style!r}")


def spec(cfg: Spaces, d: int) -> Tree:
    """No parameters."""
    return {}


def init_state(cfg: Spaces, d: int, b: int) -> Any:
    """bool [b], whether the latest byte of every row was space-like; nothing for "whitespace"."""
    return jnp.zeros(b, bool) if cfg.style == "spacebyte" else ()


def apply(p: Tree, seen: Seen, state: Any, *, cfg: Spaces) -> tuple[Boundary, Any]:
    """END marks. Raises AtomError in a stage that has no ids."""
    ids = ids_of(seen, "Spaces")
    real = seen.tokens.segments > 0
    if cfg.style == "whitespace":
        at = jnp.zeros(ids.shape, bool)
        for character in cfg.characters:
            at |= ids == character
        return Boundary(real & at), state
    like = space_like(ids)
    after = previous(like, state) & (seen.tokens.positions > 0)
    return Boundary(real & ((like & ~after) | (ids >= 256))), last_real(like, seen.tokens, state)


def space_like(ids: jax.Array) -> jax.Array:
    """bool like `ids`: neither an ASCII letter or digit nor a UTF-8 continuation byte. Special ids (from 256) are."""
    lower = ids | 0x20
    word = ((ids >= 0x30) & (ids <= 0x39)) | ((lower >= 0x61) & (lower <= 0x7A)) | ((ids >= 0x80) & (ids < 0xC0))
    return ~word
