"""What a token is worth when it leaves the window: the scores by which a lasting memory, or any cache, chooses.

Arrays are numpy's or JAX's alike. A score [t] is shared: a token is kept by all layers and heads or by none; one of
[l, h, t] lets every head choose by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.typing import AtomError

# Added to attention before its logarithm: to the largest weight, and to the sum.
LEAST_MOST, LEAST_TOTAL = 1e-4, 1e-3
# The name of a score that was fitted (`Linear`).
LEARNED = "learned"
# Learned scores are means over so many neighbours on either side.
REACH = 4


class Seen(NamedTuple):
    """t tokens (or units, of a model that has its own) that leave the window, and what is known of them.

    k, v: [l, h, t, k], keys before RoPE and values. most, total: f32 [l, h, t], the largest attention weight that
    each received from a query after it (of any query head of the group), and the sum of these. nll, following: f32
    [t], nats of the token, and of the one after it (0 where nothing is known). source: number of its text. place: i32
    [t], in that. ends: i32 [t + 1], the token behind each of them, after the first one's own.
    """

    k: Any
    v: Any
    most: Any
    total: Any
    nll: Any
    following: Any
    source: int
    place: Any
    ends: Any


def features(most: Any, total: Any, nll: Any, following: Any) -> Any:
    """f32 [f, t], what `Linear` weighs of every token: the logarithms of attention received (arrays as in `Seen`), in
    all layers and heads, of the largest first; the token's nats and the next one's."""
    xp = jnp if isinstance(most, jax.Array) else np
    t = most.shape[-1]
    received = xp.log(most + LEAST_MOST).reshape(-1, t), xp.log(total + LEAST_TOTAL).reshape(-1, t)
    return xp.concatenate([*received, nll[None], following[None]]).astype(xp.float32)


def spread(x: Any, place: Any = None) -> Any:
    """f32 [..., t]: of every token the mean over itself and REACH neighbours on either side, whose weights fall with
    the distance to 0. Sentences stay whole by that. place: i32, as x, where the tokens stand, in any order, -1 where
    there is none; None: one after another."""
    xp = jnp if isinstance(x, jax.Array) else np
    if place is not None:
        order = xp.argsort(place, axis=-1)
        sorted_ = spread_sorted(*(xp.take_along_axis(a, order, axis=-1) for a in (x, place)), xp)
        return xp.take_along_axis(sorted_, xp.argsort(order, axis=-1), axis=-1)
    return spread_sorted(x, xp.arange(x.shape[-1]), xp)


def spread_sorted(x: Any, place: Any, xp: Any) -> Any:
    """`spread` of tokens in their order, with this module of arrays."""
    around = lambda a, none: xp.pad(a, [(0, 0)] * (a.ndim - 1) + [(REACH, REACH)], constant_values=none)  # noqa: E731
    cut = lambda a, j: a[..., REACH + j : a.shape[-1] - REACH + j]  # noqa: E731
    values, places = around(xp.where(place < 0, 0, x), 0), around(place, -1)

    def near(j: int) -> Any:
        there = cut(places, j)
        falls = xp.maximum(1 - abs(there - place) / (REACH + 1), 0)
        return xp.where(there < 0, 0, falls).astype(np.float32)

    weights = [near(j) for j in range(-REACH, REACH + 1)]
    total = functools.reduce(operator.add, (w * cut(values, i - REACH) for i, w in enumerate(weights)))
    return (total / xp.maximum(functools.reduce(operator.add, weights), 1e-6)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A learned score: one linear function of standardised `features`, shared by all layers and heads, and `spread`
    over neighbours.

    mean, std, weight: f32 [f]. model: the fingerprint of the model that it was fitted for.
    """

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    model: str

    def __post_init__(self):
        shapes = {x.shape for x in (self.mean, self.std, self.weight)}
        if len(shapes) > 1 or self.mean.ndim != 1 or not (self.std > 0).all():
            raise AtomError("learned score: expected as many positive deviations and weights as there are means")

    def __call__(self, features_ft: Any) -> Any:
        """f32 [t], the scores of tokens that leave the window together."""
        if features_ft.shape[0] != len(self.weight):
            what = f"{len(self.weight)} features, and this model has {features_ft.shape[0]}"
            raise AtomError(f"learned score: it weighs {what}")
        weight = self.weight / self.std
        # Summed in one order wherever the tokens are cut.
        return spread((features_ft * weight[:, None]).sum(0) - (self.mean * weight).sum())


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a fit needs of one text: n tokens; sums of their features, float64 first [f] and second [f, f]; wanted
    [f], the mean over the tokens that are to be kept."""

    n: int
    first: np.ndarray
    second: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, features_ft: np.ndarray, wanted_t: np.ndarray) -> Moments:
        """Of `spread` features and bool [t], the tokens to keep. AtomError where there are none of these."""
        x = features_ft.astype(np.float64)
        if not wanted_t.any():
            raise AtomError("learned score: a text has no token that is to be kept")
        return cls(x.shape[1], x.sum(1), x @ x.T, x[:, wanted_t].mean(1))

    def of_attention(self) -> Moments:
        """Of attention alone, without the nats of the token and of the next one."""
        n = len(self.first) - 2
        return Moments(self.n, self.first[:n], self.second[:n, :n], self.wanted[:n])


def fit(texts: list[Moments], ridge: float, model: str) -> Linear:
    """The discriminant in closed form, averaged over texts: w = (X'X / n + ridge I)^-1 (mean of X over the tokens to
    keep - mean over all), of features standardised over all texts together."""
    if not texts:
        raise AtomError("learned score: there is no text to fit it on")
    n = sum(t.n for t in texts)
    mean = sum(t.first for t in texts) / n
    var = sum(np.diag(t.second) for t in texts) / n - mean**2
    std = np.sqrt(np.maximum(var, 1e-12))
    a, b = ridge * np.eye(len(mean)), np.zeros(len(mean))
    for t in texts:
        own = t.first / t.n
        centred = t.second / t.n - np.outer(own, mean) - np.outer(mean, own) + np.outer(mean, mean)
        a += centred / np.outer(std, std) / len(texts)
        b += (t.wanted - own) / std / len(texts)
    weight = np.linalg.solve(a, b)
    return Linear(*(x.astype(np.float32) for x in (mean, std, weight)), model)


def by_head(score: Linear, layers: int, heads: int) -> dict[str, np.ndarray]:
    """The weights of a score fitted `of_attention` on the two logarithms, "most" and "total", f32 [l, h]; what is the
    same for all tokens is left out."""
    if len(score.weight) != 2 * layers * heads:
        raise AtomError(f"learned score: {len(score.weight)} weights for {layers} layers of {heads} heads")
    most, total = (score.weight / score.std).reshape(2, layers, heads)
    return {"most": most, "total": total}


def middle(layers: int) -> slice:
    """The layers whose heads find again what was read: from a third to four fifths, 10 to 23 of 30."""
    return slice(layers // 3, max(4 * layers // 5, layers // 3 + 1))


def _observed(seen: Seen) -> np.ndarray:
    return seen.most[middle(len(seen.most))].mean((0, 1))


def _random(seen: Seen) -> np.ndarray:
    x = np.asarray(seen.place).astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seen.source + 1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return (x >> np.uint32(8)).astype(np.float32)


# Scores by name; of equal ones the newer token is kept.
SCORES: dict[str, Callable[[Seen], np.ndarray]] = {
    # The largest weight received, averaged over the heads of the `middle` layers.
    "observed": _observed,
    "observed_head": lambda seen: seen.most,
    "surprise": lambda seen: seen.nll,
    "knorm": lambda seen: -np.linalg.norm(seen.k.astype(np.float32), axis=-1),
    "random": _random,
    "recent": lambda seen: np.zeros_like(seen.nll),
}


def score(name: str, seen: Seen, learned: Linear | None) -> np.ndarray:
    """f32 [t] or [l, h, t], the scores of tokens by the score `name`: one of SCORES, or LEARNED."""
    if name == LEARNED:
        return np.asarray(learned(features(seen.most, seen.total, seen.nll, seen.following)), np.float32)
    return np.asarray(SCORES[name](seen), np.float32)


def best(score_t: np.ndarray, keep: int) -> np.ndarray:
    """i64 [..., n], the places of the largest `keep` scores along the last axis, in order; of equal ones the last."""
    t = score_t.shape[-1]
    if keep >= t:
        return np.broadcast_to(np.arange(t), score_t.shape)
    newest_first = np.argsort(-score_t[..., ::-1], axis=-1, kind="stable")
    return np.sort(t - 1 - newest_first[..., :keep], axis=-1)
