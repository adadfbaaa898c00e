"""Units of a fixed size."""

from __future__ import annotations

import dataclasses

from atom_jax import config
from atom_jax.chunking.types import END, Boundary, Seen, Tree
from atom_jax.typing import AtomError

KIND = END


@config.register
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Ends a unit every `stride` positions of a document."""

    stride: int = 4
    # Which positions: "block", the last of every stride (MegaByte, Yu et al., 2023), or "dynpool", the first
    # (dynamic token pooling's baseline, whose first unit is one position long).
    phase: str = "block"

    def __post_init__(self):
        config.check(self, stride=(1, 2**20))
        if self.phase not in ("block", "dynpool"):
            raise AtomError(f"phase: expected block or dynpool, got {self.phase!r}")


def spec(cfg: Fixed, d: int) -> Tree:
    """No parameters."""
    return {}


def init_state(cfg: Fixed, d: int, b: int) -> tuple[()]:
    """Nothing to remember."""
    return ()


def period(cfg: Fixed) -> int:
    """See `rules`."""
    return cfg.stride


def apply(p: Tree, seen: Seen, state: tuple[()], *, cfg: Fixed) -> tuple[Boundary, tuple[()]]:
    """END marks at positions 0, s, 2s, ... ("dynpool") or s - 1, 2s - 1, ... ("block") of every document."""
    at = 0 if cfg.phase == "dynpool" else cfg.stride - 1
    return Boundary((seen.tokens.segments > 0) & (seen.tokens.positions % cfg.stride == at)), state
