"""Token merging (Bolya et al., 2023)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, merged, rank
from atom_jax.typing import AtomError

PROTECTS = True


@config.register
@dataclasses.dataclass(frozen=True)
class ToMe:
    """Merges the r tokens at even places that are most like one at an odd place into it, at most half of all.

    The class token stays by itself and nothing merges into the distillation token. Slots: tokens that stayed alone,
    by falling likeness (with a class token: in their order), then those at odd places; with a distillation token it
    comes second. Of equal likenesses the first counts, in the official code any.
    """

    name: ClassVar[str] = "tome"
    r: int = 8

    def __post_init__(self):
        config.check(self, r=(0, 2**31 - 1))


def schedule(layers: int, r: int, inflection: float = 0.0) -> tuple[int, ...]:
    """How many tokens each of the layers merges, r on average: the same everywhere (inflection 0), falling to none
    (-1), rising from none (1), or anything between.

    Raises AtomError for an inflection outside [-1, 1]."""
    config.in_range("inflection", inflection, float, -1, 1)
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / (layers - 1) if layers > 1 else 0.0
    return tuple(int(low + i * step) for i in range(layers))


def tokens(cfg: ToMe, p: int, protected: int = 0) -> int:
    """p without those that are merged."""
    return p - max(min(cfg.r, (p - protected) // 2), 0)


def leaving(cfg: ToMe, m: int, grid: tuple[int, int]) -> ToMe:
    """Raises AtomError for less than half of the tokens: `schedule` spreads what is to go over layers."""
    p = grid[0] * grid[1]
    if 2 * m < p:
        raise AtomError(f"tome: one merge leaves at least half of {p} tokens, not {m}; merge in several layers")
    return dataclasses.replace(cfg, r=p - m)


def flops(cfg: ToMe, p: int, d: int, k: int) -> float:
    """Of the likenesses of tokens at even and at odd places."""
    return 2.0 * (p - p // 2) * (p // 2) * k


def reduce(cfg: ToMe, seen: Seen) -> Reduction:
    """See `ToMe`."""
    p, protected = seen.x.shape[1], seen.protected
    r = p - tokens(cfg, p, protected)
    a, b = seen.metric[:, ::2], seen.metric[:, 1::2]
    likeness = jnp.einsum("bik,bjk->bij", a, b)
    if protected > 0:
        likeness = likeness.at[:, 0].set(-jnp.inf)
    if protected > 1:
        likeness = likeness.at[:, :, 0].set(-jnp.inf)
    place = rank(likeness.max(axis=2))
    alone, count = place >= r, a.shape[1] - r
    own = jnp.cumsum(alone, axis=1) - 1 if protected else place - r
    even = jnp.where(alone, own, count + jnp.argmax(likeness, axis=2))
    odd = jnp.broadcast_to(count + jnp.arange(b.shape[1])[None], b.shape[:2])
    slot = _woven(even, odd)
    if protected > 1:
        # The distillation token moves from slot `count` to the second place.
        slot = jnp.where(slot == count, 1, slot + ((slot > 0) & (slot < count)))
    return merged(slot, _woven(alone, odd >= 0), p - r)


def _woven(even: jax.Array, odd: jax.Array) -> jax.Array:
    """[b, p] of what stands at even and at odd places."""
    out = jnp.zeros((even.shape[0], even.shape[1] + odd.shape[1]), even.dtype)
    return out.at[:, ::2].set(even).at[:, 1::2].set(odd)
