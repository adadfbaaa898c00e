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


def naive_score(p, notes, kept):
    """Of the kept positions, by name what every layer [l] noted of them, [h, t]."""
    if not p.learned:
        first = len(notes) // 3
        some = [one["most"] for one in notes[first : max(4 * len(notes) // 5, first + 1)]]
        return {i: np.mean([x[:, i] for x in some]) for i in kept}
    said = {i: 0.0 for i in kept}
    for own, one in zip(WEIGHTS, notes):
        for i in kept:
            seen = np.log(one["most"][:, i] + 1e-4), np.log(one["total"][:, i] + 1e-3)
            said[i] += sum(np.asarray(own[name]) @ x for name, x in zip(("most", "total"), seen))
    near = {i: {j: max(1 - abs(i - j) / 5, 0) for j in kept} for i in kept}
    return {i: sum(near[i][j] * said[j] for j in kept) / sum(near[i].values()) for i in kept}


@pytest.mark.parametrize(
    "p",
    [
        Shared(budget=7, sinks=1, window=2, horizon=9),
        Shared(budget=9, sinks=0, window=3, learned=True),
        Shared(budget=8, sinks=2, window=0, horizon=4, learned=True),
    ],
)
def test_later_tokens_take_the_place_of_the_least(p):
    state, calls = read(p)
    texts, kept, notes = [], [set(held(state)[0][row][0]) for row in range(3)], []
    for row, n in enumerate(LENGTHS):
        paid = []
        for c in calls:
            q, k = (np.asarray(getattr(c, x), np.float64)[row][..., :n, :] for x in "qk")
            w = naive.all_weights(q, k) * np.tril(np.ones((n, n)), -1) * np.triu(np.ones((n, n)), 1 - p.horizon)
            paid.append({"most": w.max((1, 2)), "total": w.sum((1, 2))})
        notes.append([{name: np.pad(x, ((0, 0), (0, 40))) for name, x in one.items()} for one in paid])
        texts.append([np.asarray(c.k, np.float64)[row, :, :n] for c in calls])
    memory = readings.Memory((Stack(state),), jnp.asarray(LENGTHS))
    for i in range(12):
        steps = [later(LENGTHS + i) for _ in calls]
        steps = [
            step.replace(q=jnp.roll(step.q, j, -1) * (1 + j), learned=WEIGHTS[j] if p.learned else None)
            for j, step in enumerate(steps)
        ]
        layers = [extend(layer(memory.layers[0].states, j), step)[1] for j, step in enumerate(steps)]
        stack = Stack(jax.tree.map(lambda *x: jnp.stack(x), *layers))
        memory = memory.replace(layers=jax.jit(readings.agree)((stack,)))
        for row, n in enumerate(LENGTHS):
            new, mine = n + i, kept[row]
            if len(mine) == p.budget:
                score = naive_score(p, notes[row], mine)
                free = [j for j in mine if p.sinks <= j < new - p.window]
                mine.remove(min(free or mine, key=lambda j: (score[j], j)))
            mine.add(new)
            for j, step in enumerate(steps):
                texts[row][j] = np.concatenate([texts[row][j], np.asarray(step.k, np.float64)[row]], axis=1)
                there = sorted(mine)
                scores = np.einsum(
                    "hgk,hsk->hgs", np.asarray(step.q, np.float64)[row, ..., 0, :], texts[row][j][:, there]
                )
                weights = np.array([[naive.softmax(x / np.sqrt(8)) for x in head] for head in scores])
                counts = np.array([0 < new - s < p.horizon for s in there])
                one = notes[row][j]
                one["most"][:, there] = np.maximum(one["most"][:, there], weights.max(1) * counts)
                one["total"][:, there] += weights.sum(1) * counts
            assert all(head == mine for one in held(memory.layers[0].states) for head in one[row])
