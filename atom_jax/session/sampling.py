"""Choosing the next token from logits: greedy, temperature, top-k, top-p and min-p."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.typing import AtomError

# Temperatures below this one count as 0.
COLDEST = 1e-6


@struct.dataclass
class Sampler:
    """How tokens are chosen. All fields are traced, so that changing them compiles nothing: scalars, for all rows, or
    [b], one for each.

    temperature: f32, 0 takes the most likely token. top_k: i32, 0 keeps all. top_p: f32, 1 keeps all.
    min_p: f32, 0 keeps all.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array

    @property
    def columns(self) -> Sampler:
        """The same, as it goes with [b, v]."""
        return jax.tree.map(lambda x: x[:, None] if jnp.ndim(x) else x, self)


def sampler(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampler:
    """Checks the values and packs them. Raises AtomError for a value outside its range."""
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            float(value)
        except (TypeError, ValueError, OverflowError):
            raise AtomError(f"{name}: expected a number, got a {type(value).__name__}") from None
    if not 0 <= temperature < float("inf"):
        raise AtomError(f"temperature is {temperature}; expected 0 or more")
    if not 0 <= top_k < 2**31 or top_k != int(top_k):
        raise AtomError(f"top_k is {top_k}; expected a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise AtomError(f"top_p is {top_p}; expected more than 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise AtomError(f"min_p is {min_p}; expected between 0 and 1")
    return Sampler(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p))


def row_keys(key: jax.Array | None, rows: int) -> jax.Array:
    """One key per row [rows]: of one key (None: key(0)) row r gets fold_in(key, r), whatever the batch it is in; as
    many keys as there are rows are those. Raises AtomError for another number of them, and for what is no key."""
    key = jax.random.key(0) if key is None else key
    if not hasattr(key, "dtype"):
        raise AtomError(f"key: expected a key such as jax.random.key(0), got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError) as e:
            raise AtomError(f"key: expected a key such as jax.random.key(0) ({e})") from None
    if key.ndim == 0:
        return _folded(key, rows)
    if key.shape != (rows,):
        raise AtomError(f"key has shape {list(key.shape)}; expected one key, or one for each of the {rows} prompts")
    return key


@functools.partial(jax.jit, static_argnames="rows")
def _folded(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(rows))


@struct.dataclass
class Draw:
    """One choice per row (`models.family.Draw`). keys [b]: typed PRNG keys; step: i32, one for all rows or [b],
    different for every token of a row."""

    keys: jax.Array
    step: jax.Array
    how: Sampler

    @property
    def cold(self) -> jax.Array:
        """bool [] or [b]: whether the likeliest is taken."""
        return self.how.temperature < COLDEST

    def token(self, logits_bv: jax.Array) -> jax.Array:
        """Tokens i32 [b], as `choose` draws them."""
        return choose(logits_bv, self.keys, self.step, self.how)

    def among(self, log_weight_bk: jax.Array) -> jax.Array:
        """i32 [b]: the first of the largest weights at temperature 0, else drawn as they have it, with a key of its
        own."""
        keys = jax.vmap(jax.random.fold_in)(self.keys, jnp.broadcast_to(self.step, self.keys.shape))
        drawn = jax.vmap(jax.random.categorical)(keys, log_weight_bk)
        return jnp.where(self.cold, log_weight_bk.argmax(-1), drawn).astype(jnp.int32)

    def yes(self, log_odds_b: jax.Array) -> jax.Array:
        """bool [b]: the likelier side at temperature 0, else drawn as the model has it, with a key of its own."""

        def draw() -> jax.Array:
            keys = jax.vmap(jax.random.fold_in)(self.keys, jnp.broadcast_to(self.step, self.keys.shape))
            uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
            return jnp.where(self.cold, log_odds_b > 0, uniform < jax.nn.sigmoid(log_odds_b))

        return jax.lax.cond(jnp.all(self.cold), lambda: log_odds_b > 0, draw)


def choose(logits_bv: jax.Array, keys_b: jax.Array, step: jax.Array, how: Sampler) -> jax.Array:
    """The next token i32 [b] of every row. Row r draws with fold_in(keys_b[r], step[r]).

    logits_bv: float32 [b, v]. keys_b: typed PRNG keys [b]. step: i32, one for all rows or [b], different for
    every token of a row.
    """

    keys = jax.vmap(jax.random.fold_in)(keys_b, jnp.broadcast_to(step, keys_b.shape))
    x, cold = restrict(logits_bv, how), how.columns.temperature < COLDEST

    def noise() -> jax.Array:
        return jnp.where(cold, 0.0, jax.vmap(lambda key: jax.random.gumbel(key, x.shape[1:]))(keys))

    return greedy(x + jax.lax.cond(jnp.all(cold), lambda: jnp.zeros_like(x), noise))


def greedy(logits_bv: jax.Array) -> jax.Array:
    """The most likely token i32 [b]; the lowest id among equals."""
    # Two plain reductions, which a CPU vectorizes; `argmax` takes it up to seven times as long.
    v = logits_bv.shape[-1]
    best = logits_bv >= logits_bv.max(-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_bv.shape, logits_bv.ndim - 1)
    return jnp.where(best, ids, v - 1).min(-1)


def restrict(logits_bv: jax.Array, how: Sampler) -> jax.Array:
    """Log-probabilities up to a constant, float32 [b, v], -inf for tokens that are not to be drawn.

    In order: temperature; the top_k most likely; of those, renormalised, the fewest most likely that together reach
    top_p (Holtzman et al., 2020); those at least min_p times as likely as the best (Nguyen et al., 2024). Tokens as
    likely as the last one kept are kept too.
    """
    x, each = logits_bv.astype(jnp.float32), how.columns
    x = (x - x.max(-1, keepdims=True)) / jnp.maximum(each.temperature, COLDEST)
    by_k, by_p = each.top_k > 0, each.top_p < 1

    def cut() -> jax.Array:
        top = jax.lax.cond(jnp.any(by_k), lambda: jnp.where(by_k, _top_k(x, how.top_k), x), lambda: x)
        return jax.lax.cond(jnp.any(by_p), lambda: jnp.where(by_p, _top_p(top, how.top_p), top), lambda: top)

    x = jax.lax.cond(jnp.any(by_k | by_p), cut, lambda: x)
    return jnp.where(x >= jnp.log(each.min_p), x, -jnp.inf)


def _top_k(x_bv: jax.Array, k: jax.Array) -> jax.Array:
    return _keep(x_bv, x_bv, lambda kept: jnp.sum(kept, -1) >= k)


def _top_p(x_bv: jax.Array, p: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(x_bv, axis=-1)
    return _keep(x_bv, probabilities, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0.0), -1) >= p)


def _keep(x_bv: jax.Array, rank_bv: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x where `rank` reaches the highest threshold for which the tokens at or above it are enough, else -inf.

    The threshold is found bit by bit in 32 counts over the vocabulary; sorting 49,152 logits takes a CPU 40 times
    as long.
    """
    bits = jax.lax.bitcast_convert_type(rank_bv, jnp.uint32)
    # Unsigned integers in the order of the floats.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def bit(i: jax.Array, low_b: jax.Array) -> jax.Array:
        higher = low_b | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, low_b)

    threshold = jax.lax.fori_loop(0, 32, bit, jnp.zeros(rank_bv.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], x_bv, -jnp.inf)
