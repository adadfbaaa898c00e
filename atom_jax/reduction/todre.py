"""ToDRE's first stage: tokens that differ most from each other stay."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, kept
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class ToDRE:
    """Keeps m tokens, chosen one after another by cosine distance to those already chosen: the one whose nearest is
    farthest ("kcentre"), or whose distances add up to most ("maxsum"). Others are dropped.

    From the paper's description, there is no official code; that the first one is the token least like the mean is a
    choice of ours. Its second stage, which leaves image tokens out of a language model, is not built.
    """

    name: ClassVar[str] = "todre"
    m: int = 16
    mode: str = "kcentre"

    def __post_init__(self):
        config.check(self, m=(1, 2**31 - 1))
        if self.mode not in ("kcentre", "maxsum"):
            raise AtomError(f"mode: expected kcentre or maxsum, got {self.mode!r}")


def tokens(cfg: ToDRE, p: int) -> int:
    """m."""
    return cfg.m


def leaving(cfg: ToDRE, m: int, grid: tuple[int, int]) -> ToDRE:
    """Any m."""
    return dataclasses.replace(cfg, m=m)


def flops(cfg: ToDRE, p: int, d: int, k: int) -> float:
    """Of the distances of all tokens to those that stay."""
    return 2.0 * p * cfg.m * k


def reduce(cfg: ToDRE, seen: Seen) -> Reduction:
    """See `ToDRE`."""
    x = seen.metric
    b, p, _ = x.shape
    rows = jnp.arange(b)

    def choose(i: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        newest_b, worth_bp, keep_bp = state
        distance_bp = 1 - jnp.einsum("bpk,bk->bp", x, x[rows, newest_b])
        if cfg.mode == "maxsum":
            worth_bp += distance_bp
        else:
            worth_bp = jnp.where(i == 1, distance_bp, jnp.minimum(worth_bp, distance_bp))
        newest_b = jnp.argmax(jnp.where(keep_bp, -jnp.inf, worth_bp), axis=1)
        return newest_b, worth_bp, keep_bp.at[rows, newest_b].set(True)

    first_b = jnp.argmin(jnp.einsum("bpk,bk->bp", x, x.mean(1)), axis=1)
    begin = first_b, jnp.zeros((b, p)), jnp.zeros((b, p), bool).at[rows, first_b].set(True)
    return kept(jax.lax.fori_loop(1, cfg.m, choose, begin)[2], cfg.m)
