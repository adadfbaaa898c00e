"""The choice that layers and heads share, against a plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache import readings
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.kvcache.shared import Shared
from tests.kvcache import naive_policies as naive
from tests.kvcache.test_policies import SIZES, extend, later, layer, prompt

LENGTHS = np.array([20, 13, 5])


WEIGHTS = [{"most": jnp.array([1.0, -0.5]) * i, "total": jnp.array([0.3, 2.0])} for i in range(3)]


def read(p, lengths=LENGTHS):
    """Three settled layers, and the calls that they have read."""
    calls, layers, empty = [], [], p.init(SIZES, 20, (0, 1, 2))
    for i in range(3):
        call = prompt(lengths, 20)
        learned = WEIGHTS[i] if p.learned else None
        calls.append(call.replace(q=jnp.roll(call.q, i, -1) * (1 + i), v=jnp.roll(call.v, i, -1), learned=learned))
        layers.append(extend(layer(empty, i), calls[-1])[1])
    stack = Stack(jax.tree.map(lambda *x: jnp.stack(x), *layers))
    return jax.jit(readings.settle)(Memory((stack,), jnp.asarray(lengths))).layers[0].states, calls


def held(state):
    """Positions that every layer, row and head holds."""
    return [[[set(head[head >= 0].tolist()) for head in row] for row in one] for one in np.asarray(state.pos)]


@pytest.mark.parametrize(
    "p",
    [
        Shared(budget=7, sinks=1, window=2, horizon=9),
        Shared(ratio=0.5, sinks=2, window=0),
        Shared(budget=6, sinks=0, window=1, learned=True),
    ],
)
def test_layers_and_heads_keep_the_same(p):
    state, calls = read(p)
    for row, n in enumerate(LENGTHS):
        parts = [[np.asarray(getattr(c, x), np.float64)[row][..., :n, :] for x in "qkv"] for c in calls]
        limit = min(p.budget, n) if p.budget else int(n * p.ratio)
        want = naive.shared(p, parts, limit, WEIGHTS)
        assert len(want) == limit
        assert all(head == want for one in held(state) for head in one[row])


def test_later_tokens_take_the_same_places_everywhere():
    state, _ = read(Shared(budget=7, sinks=1, window=2))
    before, layers = held(state), [layer(state, i) for i in range(3)]
    for i in range(6):
        layers = [extend(one, later(LENGTHS + i))[1] for one in layers]
    after = held(jax.tree.map(lambda *x: jnp.stack(x), *layers))
    for row, n in enumerate(LENGTHS):
        sets = {frozenset(head) for one in after for head in one[row]}
        assert len(sets) == 1
        (kept,) = sets
        assert len(kept) == 7 and {n + 4, n + 5} <= kept and 0 in kept
        assert {i for i in kept if i < n} <= before[0][row][0]
