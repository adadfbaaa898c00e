"""A unit starts at a frame that the one before did not foretell.

The rule decides with the frame that it decides about, so what comes at random is found too: the entropy of the frame
to come (`entropy`) is the same before every event that has no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import START, Boundary, Seen, Tree, last_real, previous
from atom_jax.params import ParamSpec, constant
from atom_jax.typing import AtomError

KIND = START
FRAMES = True
FORESEES = True


@config.register
@dataclasses.dataclass(frozen=True)
class Surprise:
    """Starts a unit at the first frame, and where the local prediction of a frame, made at the one before, costs more
    than a threshold."""

    # Nats per frame.
    tau: float = 1.0
    # Frames per unit to aim at: `calibrated` finds the threshold; 0 = tau as it is.
    target: float = 0.0

    def __post_init__(self):
        config.check(self, tau=(0, 1e6), target=(0, 1e9))
        if 0 < self.target <= 1:
            raise AtomError(f"target: expected 0 or more than 1 frame per unit, got {self.target}")


def spec(cfg: Surprise, d: int) -> Tree:
    """The threshold, which no gradient moves."""
    return {"tau": ParamSpec((), (), constant(cfg.tau))}


def init_state(cfg: Surprise, d: int, b: int) -> jax.Array:
    """The latest state of every row, f32 [b, d]."""
    return jnp.zeros((b, d), jnp.float32)


def apply(
    p: Tree, seen: Seen, state: jax.Array, *, cfg: Surprise, foresee: Callable[[jax.Array], jax.Array]
) -> tuple[Boundary, jax.Array]:
    """START marks, without a gradient."""
    h_btd, real = seen.h.astype(jnp.float32), seen.tokens.segments > 0
    nats_bt = jax.lax.stop_gradient(foresee(previous(h_btd, state)))
    mark = real & ((seen.tokens.positions == 0) | (nats_bt > jax.lax.stop_gradient(p["tau"])))
    return Boundary(mark, kind=START), last_real(h_btd, seen.tokens, state)


def calibrated(nats: jax.Array, cfg: Surprise) -> jax.Array:
    """The threshold f32 [] that 1 / target of these nats f32 [n], of frames that are not the first, exceed."""
    return jnp.quantile(nats, 1 - 1 / cfg.target)
