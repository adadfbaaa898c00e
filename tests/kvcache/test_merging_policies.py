"""Training-free merging next to itself written down, token by token."""

import jax
import numpy as np
import pytest

from atom_jax.kvcache.policies import parse
from tests.kvcache.test_policies import LENGTHS, SIZES, extend, later, layer, prompt, tensors

STEPS = 6


def attention(query, keys, biases, scale=8**-0.5):
    """Weights [g, s] of one token's queries [g, k]."""
    scores = query @ np.stack(keys).T * scale + np.array(biases)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def simulated(policy, row, head):
    """Entries (position -> [k, v, score, entropy]) of one head, and the outputs of its steps."""
    q, k, v = (np.asarray(x[row, head], np.float64) for x in tensors())
    n, budget = int(LENGTHS[row]), policy.budget
    held = {i: [k[i], v[i], 0.0, 0.0] for i in range(n)}
    for i in range(n):
        weights = attention(q[:, i], k[: i + 1], np.zeros(i + 1)).sum(0)
        for j in range(i + 1):
            held[j][2] += weights[j]
    outs = []

    def leave(victims):
        gone = {i: held.pop(i) for i in victims}
        groups = {}
        for i, one in gone.items():
            groups.setdefault(min(held, key=lambda j: (abs(j - i), j)), []).append(one)
        for j, others in groups.items() if policy.name == "wmerge" else ():
            every = [held[j], *others]
            total = sum(e[2] for e in every)
            mean = [sum(e[2] * e[x] for e in every) / total for x in (0, 1)]
            entropy = sum(e[2] / total * (e[3] - np.log(e[2] / total)) for e in every)
            held[j] = [*mean, total, entropy]

    def worst(last, count):
        if policy.name == "cam":
            return sorted(i for i in held if i >= policy.sinks)[:count]
        recent = last - budget // 2
        return sorted((i for i in held if i <= recent), key=lambda i: (held[i][2], i))[:count]

    leave(worst(n - 1, max(0, n - budget)))
    for at in range(n, n + STEPS):
        if len(held) >= budget:
            victim = worst(at - 1, 1)[0]
            if policy.name == "cam":
                mean = np.mean([e[2] for e in held.values()])
                for j in held if held[victim][2] > mean else ():
                    if victim < j <= victim + policy.spread:
                        held[j][1] = held[j][1] + held[victim][1] / policy.spread
            leave([victim])
        held[at] = [k[at], v[at], 0.0, 0.0]
        every = list(held.values())
        weights = attention(q[:, at], [e[0] for e in every], [e[3] for e in every])
        for entry, w in zip(every, weights.sum(0)):
            entry[2] += w
        outs.append(weights @ np.stack([e[1] for e in every]))
    return held, outs


@pytest.mark.parametrize("text", ["wmerge:budget=8", "cam:budget=8,sinks=2,spread=3"])
def test_like_the_definition(text):
    policy = parse(text)
    _, state = extend(layer(policy.init(SIZES, 60, (0, 1, 2))), prompt())
    outs = []
    for i in range(STEPS):
        out, state = extend(state, later(LENGTHS + i))
        outs.append(out)
    for row in range(3):
        for head in range(2):
            held, expected = simulated(policy, row, head)
            one = jax.tree.map(lambda x, row=row, head=head: np.asarray(x)[row, head], state.entries)
            order = np.argsort(np.where(one.pos < 0, 10**6, one.pos))[: len(held)]
            assert one.pos[order].tolist() == sorted(held)
            for x, name in ((0, "k"), (1, "v"), (2, "score")):
                theirs = np.stack([held[i][x] for i in sorted(held)])
                np.testing.assert_allclose(getattr(one, name)[order], theirs, atol=2e-4)
            got = np.stack([out[row, head, :, 0] for out in outs])
            np.testing.assert_allclose(got, np.stack(expected), atol=1e-4)


def test_cam_spreads_nothing_that_is_as_good_as_the_mean():
    """Entries that all received as much, but for rounding, in one company lie above their mean and in another not."""
    policy = parse("cam:budget=8,sinks=0,spread=3")
    _, state = extend(layer(policy.init(SIZES, 60, (0, 1, 2))), prompt())
    for slot, scores in ((0, 1.0), (0, 1.000001), (0, 2.0)):
        score = state.score * 0 + 1
        even = state.replace(score=score.at[..., slot].set(scores))
        spread = policy.absorb(even, state.n * 0 + slot, state.n > 0)
        assert bool((spread.v == even.v).all()) == (scores < 2)


def test_nothing_is_merged_into_what_leaves_in_the_same_step():
    """What wmerge's entries received adds up: where a turn was stored whole, two leave with each token after it."""
    _, state = extend(layer(parse("wmerge:budget=8").init(SIZES, 60, (0, 1, 2))), prompt())
    _, state = extend(state.grow(LENGTHS, 5), later(LENGTHS, 5))
    for i in range(8):
        _, state = extend(state, later(LENGTHS + 5 + i))
        total = np.where(state.pos < 0, 0.0, state.score).sum(-1)
        np.testing.assert_allclose(total, np.repeat(2.0 * (LENGTHS + 6 + i)[:, None], 2, 1), rtol=1e-5)
    np.testing.assert_array_equal(state.n, 8)
