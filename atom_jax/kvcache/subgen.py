"""SubGen (Zandieh, Han, Mirrokni & Karbasi, 2024): clusters of keys, and values drawn by their norms.

Of the tokens that are not kept apart there is a sketch, from which two sums are estimated:

* sum_i exp(q k_i), the denominator of attention, from clusters. A key joins the nearest cluster if that one's first
  key is no further than delta, and starts one otherwise. A cluster has the number n of its keys and `samples` of
  them, each drawn uniformly and apart from the others: a coin of probability 1/n replaces it. The estimate is the sum
  over clusters of n times the mean of exp(q k) over the samples.
* sum_i exp(q k_i) v_i, the numerator, from tokens that are drawn, apart from each other, with probabilities that are
  proportional to |v|^2: a coin of probability |v|^2 / mass replaces each, mass being the sum of all |v|^2 so far. The
  estimate is the mean over them of exp(q k) v mass / |v|^2.

Both are unbiased; their quotient is not. (Scores are divided by the root of the head size, as everywhere.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.kvcache.budget import put
from atom_jax.kvcache.dense import alone
from atom_jax.kvcache.layer import Call, Layer, Sizes, stack_layers
from atom_jax.kvcache.merging import take
from atom_jax.kvcache.policy import Policy
from atom_jax.nn.attention import NEGATIVE
from atom_jax.typing import AtomError

# Tokens of a call, where a prompt may be cut.
PART = 1024


@config.register
@dataclasses.dataclass(frozen=True)
class SubGen(Policy):
    """budget: entries per row and key/value head that are never exceeded; a key alone is half of one. The `sinks`
    first tokens and the newest ones, a share `recent` of the budget, the one that reads included, are kept as they
    are. Of the entries left, a share `values` goes to drawn tokens and the others to clusters, 1 + `samples` keys
    each; there is room for at least one of both, at the cost of the newest tokens.
    delta: the largest distance of a key to the first one of its cluster; how many clusters that makes is up to the
    keys of the model and the text. seed: of all coins.
    exact: the prompt (the first call) is attended to exactly, and the sketch made of it is read by what follows.
    Otherwise each token, of a prompt too, reads the sketch as it stands at its place, as in the paper's algorithm,
    and a prompt may be cut anywhere.

    Sources: the abstract says that keys are clustered online and values sampled by their norms. A public review of
    the paper's later version ("ClusterGen", 2025) quotes both coins, tossed for every sample apart, and says that its
    experiments cluster the keys of a prompt once by greedy k-centers, and not in a stream. The rest of the module's
    first lines is as it is remembered of the paper; its text and its code were not at hand. What differs:

    * The number of clusters has an upper limit, from which on a key joins the nearest one whatever the distance. In
      the paper it grows with the text, and delta bounds the error; nothing is promised here.
    * Sinks and newest tokens are apart, and exact. Whether they are so in the paper's experiments was not found; its
      algorithm puts every token into the sketch before that token's query reads it, as sinks=0,recent=0 do here.
    * The denominator is never below the largest exp(q k) of a key that is held, which is one of its terms.

    Keys are as they are cached, turned by RoPE: so a distance bounds by how much any query's scores differ, and equal
    keys far apart in a text are not equal. Coins depend on seed, layer, head and the token's place in its row.
    """

    name: ClassVar[str] = "subgen"
    budget: int = 0
    sinks: int = 4
    recent: float = 0.5
    values: float = 0.5
    samples: int = 1
    delta: float = 12.0
    seed: int = 0
    exact: bool = True

    def __post_init__(self):
        most, share = (0, 2**24), (0.0, 1.0)
        config.check(
            self, budget=most, sinks=most, recent=share, values=share, samples=(1, 1024), delta=(0.0, 1e6),
            seed=(0, 2**31 - 1),
        )  # fmt: skip
        if self.budget < self.sinks + 1 + self._least:
            raise AtomError(
                f"memory {self.name}: expected budget=ENTRIES of at least {self.sinks + 1 + self._least}, which"
                f" {self.sinks} sinks, a token and a cluster of {1 + self.samples} keys need, got {self.budget}"
            )

    @property
    def _least(self) -> int:
        """Entries of one cluster."""
        return -(-(1 + self.samples) // 2)

    @property
    def newest(self) -> int:
        """Newest tokens that are kept as they are."""
        return min(math.floor(self.budget * self.recent), self.budget - self.sinks - 1 - self._least)

    @property
    def drawn(self) -> int:
        """Tokens drawn by the norms of their values."""
        left = self.budget - self.sinks - self.newest
        return min(max(1, math.floor(left * self.values)), left - self._least)

    @property
    def clusters(self) -> int:
        """The upper limit of their number."""
        return 2 * (self.budget - self.sinks - self.newest - self.drawn) // (1 + self.samples)

    @property
    def part(self) -> int | None:
        """Prompts that are read exactly are read whole."""
        return None if self.exact else PART

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> SubGenLayer:
        """Buffers of the whole budget: they never grow."""
        return stack_layers(SubGenLayer.empty(self, sizes), len(numbers))

    def expected(self, length: int) -> int:
        """Every token, as long as there is no sketch; then what there is where every key starts a cluster."""
        past = length - self.sinks - self.newest
        if past <= 0:
            return length
        return self.sinks + self.newest + self.drawn + -(-min(past, self.clusters) * (1 + self.samples) // 2)

    def describe(self) -> str:
        """What its memory is made of."""
        return (
            f"{self.name}: {self.sinks} first and {self.newest} newest tokens, {self.drawn} drawn by their values, at"
            f" most {self.clusters} clusters with {self.samples} of their keys"
        )


@struct.dataclass
class SubGenLayer(Layer):
    """The memory of one layer: e = sinks + newest tokens, and a sketch of c clusters with t samples and of s tokens.

    k, v: [b, h, e, k], the token at place p < e of a row in slot p, a later one in slot sinks + (p - sinks) mod
    newest. first: [b, h, c, k], the first keys of clusters. samples: [b, h, c, t, k]. count: i32 [b, h, c], keys of
    every cluster, 0 of those that there are not yet. drawn_k, drawn_v: [b, h, s, k]. mass: f32 [b, h], the sum of the
    squared norms of all values in the sketch. policy: static.
    """

    k: jax.Array
    v: jax.Array
    first: jax.Array
    samples: jax.Array
    count: jax.Array
    drawn_k: jax.Array
    drawn_v: jax.Array
    mass: jax.Array
    policy: SubGen = struct.field(pytree_node=False, default=None)

    @classmethod
    def empty(cls, policy: SubGen, sizes: Sizes) -> SubGenLayer:
        """A layer with nothing in it."""
        rows, c = (sizes.b, sizes.h), policy.clusters
        zeros = lambda *n: jnp.zeros((*rows, *n, sizes.k), sizes.dtype)  # noqa: E731
        kept, drawn = policy.sinks + policy.newest, policy.drawn
        return cls(
            zeros(kept), zeros(kept), zeros(c), zeros(c, policy.samples), jnp.zeros((*rows, c), jnp.int32),
            zeros(drawn), zeros(drawn), jnp.zeros(rows, jnp.float32), policy,
        )  # fmt: skip

    def extend(self, call: Call) -> tuple[jax.Array, SubGenLayer]:
        """Stores new tokens one after another, each of which then attends; see `layer.Layer`."""
        t = call.q.shape[3]
        if call.fresh and self.policy.exact:
            layer, _ = jax.lax.scan(lambda layer, i: (layer._stored(call.one(i)), None), self, jnp.arange(t))
            return alone(call, None), layer
        if t > 1:
            return self.one_by_one(call)
        layer = self._stored(call)
        _, above, below = layer.sums(call.q[..., 0, :], call.after)
        # The largest of all terms is 1 here, and one of those that `below` estimates the sum of.
        return (above / jnp.maximum(below, 1.0)[..., None]).astype(call.q.dtype)[..., None, :], layer

    def sums(self, q_bhgk: jax.Array, length_b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For one query per row, of rows of so many tokens: the largest score of a key that is held, f32 [b, h, g],
        and the estimates of numerator, f32 [b, h, g, k], and denominator, f32 [b, h, g], both divided by that one's
        exponential."""
        b, h, c, t, size = self.samples.shape
        there = jnp.arange(self.k.shape[2])[None] < length_b[:, None]
        sampled = jnp.repeat(self.count, t, axis=2)
        norms = jnp.sum(jnp.square(self.drawn_v.astype(jnp.float32)), axis=-1)
        parts = (
            (self.k, jnp.broadcast_to(there[:, None], (b, h, there.shape[1]))),
            (self.samples.reshape(b, h, c * t, size), sampled > 0),
            (self.drawn_k, norms > 0),
        )
        scores = [_scores(q_bhgk, k, seen) for k, seen in parts]
        top = jnp.max(jnp.concatenate(scores, axis=-1), axis=-1)
        kept, sampled_terms, drawn = (jnp.exp(s - top[..., None]) for s in scores)
        stands = sampled.astype(jnp.float32) / t
        weight = self.mass[..., None] / (norms.shape[2] * jnp.where(norms > 0, norms, 1.0))
        below = kept.sum(-1) + jnp.sum(sampled_terms * stands[:, :, None], axis=-1)
        above = _summed(kept, self.v) + _summed(drawn * weight[:, :, None], self.drawn_v)
        return top, above, below

    def _stored(self, call: Call) -> SubGenLayer:
        """With one more token of every row; the one that leaves the newest goes into the sketch."""
        cfg, (b, h, e, _) = self.policy, self.k.shape
        real, at = call.real[:, 0], call.length
        k, v = (x[:, :, 0].astype(self.k.dtype) for x in (call.k, call.v))
        # Past the end where there is no token, and where none is kept as it is.
        slot = jnp.where(at < e, at, cfg.sinks + (at - cfg.sinks) % max(cfg.newest, 1))
        slot = jnp.broadcast_to(jnp.where(real, slot, e)[:, None], (b, h))
        old = k, v
        if cfg.newest:
            old = tuple(take(x, jnp.minimum(slot, e - 1)[..., None])[:, :, 0] for x in (self.k, self.v))
        layer = self._sketched(*old, at - cfg.newest, real & (at >= e), call.layer)
        return layer.replace(k=put(self.k, k, slot), v=put(self.v, v, slot))

    def _sketched(
        self, k_bhk: jax.Array, v_bhk: jax.Array, place_b: jax.Array, live_b: jax.Array, number: Any
    ) -> SubGenLayer:
        """With one more token in the sketch of every row where `live`. number: of the layer."""
        cfg, (b, h, c, t, _) = self.policy, self.samples.shape
        coins = _coins(cfg.seed, number, place_b, (h, t + cfg.drawn))
        live = jnp.broadcast_to(live_b[:, None], (b, h))
        apart = jnp.sum(jnp.square(self.first.astype(jnp.float32) - k_bhk.astype(jnp.float32)[:, :, None]), axis=-1)
        apart = jnp.where(self.count > 0, apart, jnp.inf)
        held = self._clusters()
        opens = (held < c) & (apart.min(-1) > cfg.delta**2)
        # Past the end, where nothing is written, where there is no token.
        at = jnp.where(live, jnp.where(opens, held, jnp.argmin(apart, axis=-1)), c)
        here = jnp.minimum(at, c - 1)[..., None]
        count = take(self.count, here)[..., 0] + 1
        new = coins[..., :t] * count[..., None] < 1.0
        old = jnp.take_along_axis(self.samples, here[..., None, None], axis=2)[:, :, 0]
        norm = jnp.sum(jnp.square(v_bhk.astype(jnp.float32)), axis=-1)
        mass = self.mass + jnp.where(live, norm, 0.0)
        taken = (live[..., None] & (coins[..., t:] * mass[..., None] < norm[..., None]))[..., None]
        return self.replace(
            first=put(self.first, k_bhk, jnp.where(opens, at, c)),
            samples=put(self.samples, jnp.where(new[..., None], k_bhk[:, :, None], old), at),
            count=put(self.count, count, at),
            drawn_k=jnp.where(taken, k_bhk[:, :, None], self.drawn_k),
            drawn_v=jnp.where(taken, v_bhk[:, :, None], self.drawn_v),
            mass=mass,
        )

    def _clusters(self) -> jax.Array:
        """i32 [b, h]: clusters that there are."""
        return jnp.sum(self.count > 0, axis=-1, dtype=jnp.int32)

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """No rows: there is always room."""
        return jnp.zeros(length_b.shape, bool)

    def grow(self, length_b: np.ndarray, more: int) -> SubGenLayer:
        """Itself."""
        return self

    def held(self, length_b: jax.Array) -> jax.Array:
        """Tokens that are kept as they are, drawn tokens, and half an entry for every key of a cluster, its first one
        included; rounded up."""
        keys, drawn = self._clusters() * (1 + self.policy.samples), self.drawn_k.shape[2]
        kept = jnp.minimum(length_b, self.k.shape[2])[:, None]
        return kept + jnp.where(keys > 0, drawn, 0) + (keys + 1) // 2


def _coins(seed: int, number: Any, place_b: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """f32 [b, *shape], uniform from 0 to 1, of the tokens at these places of any row, in a layer of this number."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place), shape))(place_b)


def _scores(q_bhgk: jax.Array, k_bhsk: jax.Array, seen_bhs: jax.Array) -> jax.Array:
    """f32 [b, h, g, s]: scores of one query per row and query head, NEGATIVE where there is no key."""
    scores = jnp.einsum("bhgk,bhsk->bhgs", q_bhgk, k_bhsk, preferred_element_type=jnp.float32)
    seen = jnp.broadcast_to(seen_bhs[:, :, None], scores.shape)
    return jnp.where(seen, scores * q_bhgk.shape[-1] ** -0.5, NEGATIVE)


def _summed(weights_bhgs: jax.Array, v_bhsk: jax.Array) -> jax.Array:
    """f32 [b, h, g, k]: sums of values by these weights."""
    weights = weights_bhgs.astype(v_bhsk.dtype)
    return jnp.einsum("bhgs,bhsk->bhgk", weights, v_bhsk, preferred_element_type=jnp.float32)
