"""Generation in which rows wait for each other, so that the network inside runs for several of them at once.

Most weights belong to the layers over units, which run once per unit. Rows begin or end units at different steps: of
many rows some row nearly always does, and reading all weights at every step would cost a batch the bytes-per-unit
times what it has to. Waiting for the last row has a price too: those of the byte level are read more often.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def size(rows: int, rate: float, outer: float, inner: float) -> int:
    """How many rows of a batch should wait before the network inside runs, so that bytes cost least.

    Units are taken to end at random, at the share `rate` of bytes; a step over bytes costs `outer`, and the network
    inside `inner`, for one row or all (decoding reads weights). Between two runs the number w of rows that wait is a
    Markov chain: in the visits to each w, those rows rest and the others read a byte each.
    """
    rate = min(rate, 0.999)
    visits, steps, read, best = [], 0.0, 0.0, (math.inf, 1)
    for w in range(rows):
        arrivals = (w == 0) + sum(n * _binomial(rows - u, w - u, rate) for u, n in enumerate(visits))
        visits.append(arrivals / (1 - _binomial(rows - w, 0, rate)))
        steps += visits[w]
        read += visits[w] * (rows - w)
        best = min(best, ((outer * steps + inner) / read, w + 1))
    return best[1]


def met(waits_b: jax.Array, live_b: jax.Array, quorum: int) -> jax.Array:
    """Whether the network inside runs, bool []: when `quorum` of the rows that go on wait, or all of them."""
    waiting = jnp.sum(waits_b & live_b)
    return (waiting > 0) & (waiting >= jnp.minimum(quorum, jnp.sum(live_b)))


def _binomial(n: int, k: int, p: float) -> float:
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
