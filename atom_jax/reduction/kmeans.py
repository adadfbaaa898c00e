"""k-means clusters of the tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.reduction.types import Reduction, Seen, apply, merged


@config.register
@dataclasses.dataclass(frozen=True)
class KMeans:
    """Averages the tokens of each of m clusters: Lloyd's k-means, Euclidean, from m tokens evenly spaced.

    After VQToken's abstract, which has a codebook of clusters; its learned attention over them is not built. Clusters
    stand in the order of their most central tokens; empty ones come last.
    """

    name: ClassVar[str] = "kmeans"
    m: int = 16
    iterations: int = 10

    def __post_init__(self):
        config.check(self, m=(1, 2**31 - 1), iterations=(0, 2**31 - 1))


def tokens(cfg: KMeans, p: int) -> int:
    """m."""
    return cfg.m


def leaving(cfg: KMeans, m: int, grid: tuple[int, int]) -> KMeans:
    """Any m."""
    return dataclasses.replace(cfg, m=m)


def flops(cfg: KMeans, p: int, d: int, k: int) -> float:
    """Of the distances of all tokens and all centres, again after every iteration."""
    return 2.0 * p * cfg.m * d * (cfg.iterations + 1)


def reduce(cfg: KMeans, seen: Seen) -> Reduction:
    """See `KMeans`."""
    x, m = seen.x.astype(jnp.float32), cfg.m
    p = x.shape[1]

    def improve(_: int, centre_bmd: jax.Array) -> jax.Array:
        found = _assigned(x, centre_bmd)
        return jnp.where(found.size[..., None] > 0, apply(x, None, found)[0], centre_bmd)

    start = (2 * jnp.arange(m) + 1) * p // (2 * m)
    centre = jax.lax.fori_loop(0, cfg.iterations, improve, x[:, start])
    found = _assigned(x, centre)
    order = jnp.argsort(jnp.where(found.size > 0, found.at, p), axis=1, stable=True)
    slot = jnp.take_along_axis(jnp.argsort(order, axis=1), found.slot, axis=1)
    size, at = (jnp.take_along_axis(values, order, axis=1) for values in (found.size, found.at))
    return Reduction(slot.astype(jnp.int32), found.share, size, at)


def _assigned(x: jax.Array, centre_bmd: jax.Array) -> Reduction:
    """Every token in the cluster of the nearest centre; the nearest of a cluster lends its position."""
    m = centre_bmd.shape[1]
    inner = jnp.einsum("bpd,bmd->bpm", x, centre_bmd)
    distance = (x**2).sum(-1, keepdims=True) - 2 * inner + (centre_bmd**2).sum(-1)[:, None]
    slot = jnp.argmin(distance, axis=2)
    own = jnp.where(slot[..., None] == jnp.arange(m)[None, None], distance, jnp.inf)
    nearest = jnp.take_along_axis(jnp.argmin(own, axis=1), slot, axis=1)
    return merged(slot, nearest == jnp.arange(x.shape[1])[None], m)
