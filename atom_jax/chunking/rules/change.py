"""A unit starts where a frame differs from the one before; a baseline, for it cannot tell motion that one could have
foretold from what is new."""

from __future__ import annotations

import dataclasses

from atom_jax import config
from atom_jax.chunking.types import START, Boundary, Seen, Tree
from atom_jax.typing import AtomError

KIND = START
FRAMES = True


@config.register
@dataclasses.dataclass(frozen=True)
class Change:
    """Starts a unit where more than a share `least` of a frame has changed."""

    least: float = 0.0

    def __post_init__(self):
        config.check(self, least=(0, 1))


def spec(cfg: Change, d: int) -> Tree:
    """No parameters."""
    return {}


def init_state(cfg: Change, d: int, b: int) -> tuple[()]:
    """Nothing to remember: the model's port knows the frame before."""
    return ()


def apply(p: Tree, seen: Seen, state: tuple[()], *, cfg: Change) -> tuple[Boundary, tuple[()]]:
    """START marks; a first frame is always one. Raises AtomError in a stage whose positions are units."""
    if seen.changed is None or seen.deep:
        raise AtomError("rule: Change compares frames, so it can only cut the outermost stage")
    first = seen.tokens.positions == 0
    return Boundary((seen.tokens.segments > 0) & (first | (seen.changed > cfg.least)), kind=START), state
