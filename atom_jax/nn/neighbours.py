"""Next tokens as they followed the nearest of many remembered states, mixed with what the head says: kNN-LM
(Khandelwal et al., 2020).

Dimension letters besides those of `atom_jax.typing`: q queries, m remembered states, n neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.nn.blocks import in_blocks
from atom_jax.params import Tree

# The name of a `Datastore` among a model's parameters.
NAME = "neighbours"
# Queries, and states, whose distances exist at once.
ROWS, BLOCK = 64, 8192
# States that the temperature is found from, and its share of the median of their distances; how many of the nearest
# may be a state once more, as where a text was read twice, and how far apart these are, for their squared length.
SAMPLE, SHARE = 256, 0.3
TWINS, SAME = 32, 1e-5
COLDEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """How remembered states are mixed in. nearest: so many of them count, with softmax(-squared distance /
    temperature) of what is read. temperature 0: 0.3 times the median, over some of the states, of the squared
    distance to the nearest one that differs. weight: their share of the mixture; 0 leaves the model as it is.

    The official code has 1,024 neighbours, no temperature (1) and a weight of 0.25.
    """

    nearest: int = 1024
    temperature: float = 0.0
    weight: float = 0.05

    def __post_init__(self):
        config.check(self, nearest=(1, 2**20), temperature=(0, 1e30), weight=(0, 1))


@struct.dataclass
class Datastore:
    """Remembered states: keys [m, d], the tokens that followed, i32 [m], and squared lengths of keys, f32 [m]
    (infinite where there is no state). weight, temperature: f32 [], as of `Neighbours`; nearest: static."""

    keys: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    weight: jax.Array
    temperature: jax.Array
    nearest: int = struct.field(pytree_node=False, default=1)

    @classmethod
    def of(cls, keys_md: np.ndarray, tokens_m: np.ndarray, how: Neighbours, size: int) -> Datastore:
        """At least one state, with room for `size` of them."""
        m, size = len(keys_md), size if size <= BLOCK else -(-size // BLOCK) * BLOCK
        keys = jnp.asarray(np.pad(keys_md, [(0, size - m), (0, 0)]))
        lengths = np.square(keys_md.astype(np.float32)).sum(1)
        lengths = jnp.asarray(np.pad(lengths, (0, size - m), constant_values=np.inf))
        warm = how.temperature or SHARE * _apart(keys, lengths, keys_md)
        numbers = (jnp.float32(x) for x in (how.weight, max(warm, COLDEST)))
        return cls(keys, jnp.asarray(np.pad(tokens_m, (0, size - m)), jnp.int32), lengths, *numbers, how.nearest)

    def find(self, x_qd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest states of each query, nearest first: shares f32 [q, n], which add up to 1, and i32 [q, n]."""

        def some(x_qd: jax.Array) -> tuple[jax.Array, jax.Array]:
            distance, index = nearest(self.keys, self.lengths, x_qd, self.nearest)
            return jax.nn.softmax(-distance / self.temperature, axis=-1), index

        return _in_rows(some, x_qd)


def beside(params: Tree, store: Datastore) -> Tree:
    """The parameters of a model whose logits are then the logarithms of the mixture."""
    return {**params, NAME: store}


def mixed(logits_btv: jax.Array, x_btd: jax.Array, store: Datastore) -> jax.Array:
    """Log-probabilities f32 [b, t, v] of the mixture of a head's distribution and of what the states nearest to x
    say: log((1 - weight) softmax(logits) + weight sum of shares of a token's neighbours)."""
    b, t, v = logits_btv.shape

    def some(logits_qv: jax.Array, x_qd: jax.Array) -> jax.Array:
        share_qn, index_qn = store.find(x_qd)
        rows = jnp.arange(len(x_qd))[:, None]
        said_qv = jnp.zeros(logits_qv.shape, jnp.float32).at[rows, store.tokens[index_qn]].add(share_qn)
        own = jax.nn.log_softmax(logits_qv.astype(jnp.float32), axis=-1)
        return blended(own, jnp.log(said_qv), store.weight)

    return _in_rows(some, logits_btv.reshape(b * t, v), x_btd.reshape(b * t, -1)).reshape(b, t, v)


def blended(own: jax.Array, other: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Log-probabilities of a mixture in which `other`, log-probabilities of the same shape, has this weight."""
    return jnp.logaddexp(jnp.log1p(-weight) + own, jnp.log(weight) + other)


def nearest(keys_md: jax.Array, lengths_m: jax.Array, x_qd: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """f32 and i32 [q, n], the least squared distances of queries to keys, in order, and whose they are: exact, block
    by block. Of more than BLOCK keys there are whole blocks; n is at most m."""
    m, x = len(keys_md), x_qd.astype(jnp.float32)
    n, size = min(n, m), min(BLOCK, m)

    def some(best: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        keys, lengths = (jax.lax.dynamic_slice_in_dim(a, first, size) for a in (keys_md, lengths_m))
        product = jnp.einsum("qd,md->qm", x, keys.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        index = jnp.broadcast_to((first + jnp.arange(size, dtype=jnp.int32))[None], product.shape)
        here = lengths[None] - 2 * product, index
        distance, index = (jnp.concatenate(both, axis=1) for both in zip(best, here))
        least, which = jax.lax.top_k(-distance, n)
        return (-least, jnp.take_along_axis(index, which, axis=1)), None

    none = jnp.full((len(x), n), jnp.inf), jnp.zeros((len(x), n), jnp.int32)
    (distance, index), _ = jax.lax.scan(some, none, jnp.arange(0, m, size, dtype=jnp.int32))
    return jnp.maximum(distance + jnp.sum(x * x, axis=1, keepdims=True), 0.0), index


def _in_rows(some: Callable[..., Any], *arrays: jax.Array) -> Any:
    """What `some` makes of arrays [q, ...], of ROWS queries at a time."""
    q = len(arrays[0])
    if q <= ROWS:
        return some(*arrays)
    parts = tuple(in_blocks(x, 0, ROWS) for x in arrays)
    out = jax.lax.map(lambda part: some(*part), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:q], out)


def _apart(keys_md: jax.Array, lengths_m: jax.Array, real_md: np.ndarray) -> float:
    """The median squared distance of some of the real keys to the nearest one that differs; 1 where none is known."""
    some = real_md[np.linspace(0, len(real_md) - 1, min(SAMPLE, len(real_md))).astype(int)]
    found, _ = jax.jit(nearest, static_argnames="n")(keys_md, lengths_m, some, n=TWINS)
    found, length = np.asarray(found), np.square(some.astype(np.float32)).sum(1, keepdims=True)
    least = np.where(found > SAME * length, found, np.inf).min(1)
    least = least[np.isfinite(least)]
    return float(np.median(least)) if len(least) else 1.0
