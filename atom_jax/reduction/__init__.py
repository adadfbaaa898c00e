"""Token reduction without training: fewer tokens for the rest of an encoder.

A reducer is a registered configuration class with a `name`, and a module that has four functions:
`reduce(cfg, seen) -> Reduction` says where tokens go, `tokens(cfg, p)` how many of p are left (static),
`leaving(cfg, m, grid)` is the same reducer made to leave m of the tokens of a grid, and `flops(cfg, p, d, k)` counts
the operations of its products, two per multiply-add, for tokens of width d and keys of size k.
It sees no protected tokens, unless PROTECTS = True: then `reduce` looks at `seen.protected` itself, and p and m count
these tokens. ATTENTION = True: it looks at `seen.attention`, which `blocks` finds out for such reducers alone.
What is kept stands in the image's order but for `tome`, whose own order decides what it compares next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction import globalcom2, hiprune, kmeans, kth, pool, random_tokens, todre, tome
from atom_jax.reduction.types import Reduction, Seen, apply, expand, identity, largest, source, trace
from atom_jax.typing import AtomError

__all__ = [
    "REDUCERS", "Reduction", "Seen", "apply", "expand", "identity", "largest", "leaving", "of", "parse", "reduce",
    "register", "source", "tokens", "trace",
]  # fmt: skip

# From the class of a configuration to the reducer.
REDUCERS: dict[type, Any] = {
    tome.ToMe: tome,
    kth.Kth: kth,
    random_tokens.RandomTokens: random_tokens,
    pool.Pool: pool,
    kmeans.KMeans: kmeans,
    hiprune.HiPrune: hiprune,
    globalcom2.GlobalCom2: globalcom2,
    todre.ToDRE: todre,
}


def register(cfg: type, reducer: Any) -> None:
    """Makes a reducer of one's own known under its (registered) configuration class."""
    REDUCERS[cfg] = reducer


def of(cfg: Any) -> Any:
    """The reducer of a configuration. Raises AtomError for anything else."""
    if type(cfg) not in REDUCERS:
        raise AtomError(f"reduction: expected one of {', '.join(c.__name__ for c in REDUCERS)}, got {cfg!r}")
    return REDUCERS[type(cfg)]


def parse(text: str) -> Any:
    """The configuration that a text such as "todre:m=16,mode=maxsum" names. Raises AtomError for an unknown name, an
    unknown field or an unreadable value."""
    return config.named(text, {cls.name: cls for cls in REDUCERS}, "reduction")


def tokens(cfg: Any, p: int, protected: int = 0) -> int:
    """How many of p tokens are left, the protected ones included."""
    reducer = of(cfg)
    if getattr(reducer, "PROTECTS", False):
        return reducer.tokens(cfg, p, protected)
    return protected + min(reducer.tokens(cfg, p - protected), p - protected)


def leaving(cfg: Any, m: int, grid: tuple[int, int]) -> Any:
    """The same reducer made to leave m of the tokens of a grid. Raises AtomError where it can't."""
    if not 1 <= m <= grid[0] * grid[1]:
        raise AtomError(f"reduction: {m} of {grid[0]} x {grid[1]} tokens")
    return of(cfg).leaving(cfg, m, grid)


def reduce(cfg: Any, seen: Seen) -> Reduction:
    """Where the tokens go. Raises AtomError for tokens or attention that the reducer needs and `seen` lacks."""
    reducer, (b, p, _), protected = of(cfg), seen.x.shape, seen.protected
    if tokens(cfg, p, protected) >= p:
        return identity(b, p)
    if getattr(reducer, "PROTECTS", False) or not protected:
        return reducer.reduce(cfg, seen)
    inner = reducer.reduce(cfg, _without(seen, protected))
    own = identity(b, protected)
    return Reduction(
        slot=jnp.concatenate([own.slot, inner.slot + protected], axis=1),
        share=jnp.concatenate([own.share, inner.share], axis=1),
        size=jnp.concatenate([own.size, inner.size], axis=1),
        at=jnp.concatenate([own.at, inner.at + protected], axis=1),
    )


def _without(seen: Seen, protected: int) -> Seen:
    """The tokens after the protected ones."""
    x, key, attention = (
        None if values is None else jax.lax.slice_in_dim(values, protected, None, axis=axis)
        for values, axis in ((seen.x, 1), (seen.key, 1), (seen.attention, 2))
    )
    return dataclasses.replace(seen, x=x, key=key, attention=attention, protected=0)
