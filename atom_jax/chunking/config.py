"""How one stage of a model cuts its positions into units."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from atom_jax import config
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class Chunking:
    """Boundary rule, pool, mixing and upsampling of one stage, and how many chunks there is room for."""

    # A registered rule configuration (chunking/rules).
    rule: Any = None
    # How a chunk becomes vectors: a name in `pooling.POOLS`.
    pool: str = "first"
    # Vectors per chunk ("attention"); every other pool makes one.
    slots: int = 1
    # Positions of a chunk that have weights of their own (pool "concat", upsampling "slots").
    max_positions: int = 8
    # Attention heads of pool "attention" and upsampling "cross_attention".
    heads: int = 4
    # What happens between the inner network and the upsampling: "none" or "ema" (H-Net's smoothing).
    mix: str = "none"
    # How positions read chunks: a name in `upsampling.UPSAMPLERS`.
    upsample: str = "repeat"
    # What a position adds to what it reads: "linear" (H-Net: a learned map of its encoder state, zero at first),
    # "identity" (its encoder state) or "none".
    residual: str = "linear"
    # Scale what is read by the router's confidence, forwards 1 (H-Net's straight-through estimator).
    confidence: bool = False
    # LayerNorm on chunk vectors before the inner network (dynamic token pooling).
    norm: bool = False
    # Chunk slots per position that are computed; rounded up to a multiple of 8.
    capacity: float = 0.5
    # While training, the rows of one device share their slots: counts average out, so fewer are needed.
    pack: bool = False

    def __post_init__(self):
        size = (1, 2**20)
        config.check(self, capacity=(0, 1), slots=size, max_positions=size, heads=size)
        if not 0 < self.capacity <= 1:
            raise AtomError(f"capacity: expected chunks per position in (0, 1], got {self.capacity}")
        if self.mix not in ("none", "ema"):
            raise AtomError(f"mix: expected none or ema, got {self.mix!r}")
        if self.residual not in ("linear", "identity", "none"):
            raise AtomError(f"residual: expected linear, identity or none, got {self.residual!r}")


def per_stage(positions: int, chunking: tuple[Chunking, ...]) -> tuple[int, ...]:
    """How many positions every stage has room for, the innermost included, of so many outermost ones. From the second
    one on there is one more, for the unit that a text begins with."""
    out = [positions]
    for one in chunking:
        out.append(slots_for(out[-1], one.capacity) + 1)
    return tuple(out)


def slots_for(positions: int, capacity: float, multiple: int = 8) -> int:
    """Chunk slots for `positions` positions: a multiple of 8, but at most one for each."""
    wanted = max(math.ceil(positions * capacity - 1e-6), 1)
    return min(positions, -(-wanted // multiple) * multiple)
