"""Quest: pages chosen by their bounds, against a search by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import policies
from tests.kvcache import naive_policies as naive
from tests.kvcache.test_policies import LENGTHS, SIZES, extend, later, layer, prompt, tensors


def chosen(row, a, at, pages, page=4):
    """Positions that the token at position `at` reads."""
    q, k = tensors()[0][row, a, :, at], tensors()[1][row, a]
    current = at // page
    bounds = []
    for i in range(current):
        keys = k[i * page : (i + 1) * page]
        bounds.append(sum(np.maximum(x * keys.min(0), x * keys.max(0)).sum() for x in q))
    best = np.argsort(bounds)[::-1][:pages]
    return np.concatenate([*(np.arange(i * page, (i + 1) * page) for i in sorted(best)),
                           np.arange(current * page, at + 1)]).astype(int)  # fmt: skip


def test_a_token_reads_the_pages_with_the_largest_bounds():
    state = layer(policies.parse("quest:budget=12,page=4").init(SIZES, 60, (0, 1, 2)))
    _, state = extend(state, prompt())
    for i in range(12):
        call = later(LENGTHS + i)
        out, state = extend(state, call)
        for row, at in enumerate(LENGTHS + i):
            for a in range(2):
                held = chosen(row, a, at, 3)
                w = naive.attention(tensors()[0][row, a, 1, at], tensors()[1][row, a, held], at, held)
                np.testing.assert_allclose(out[row, a, 1, 0], w @ tensors()[2][row, a, held], atol=2e-5)
            assert state.read(LENGTHS + i + 1)[row, 0] == len(held) + at // 4 + 1


def test_statistics_after_single_tokens_are_those_of_a_prompt():
    p = policies.parse("quest:ratio=0.5,page=4")
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    np.testing.assert_array_equal(state.limit[:, 0], [5, 2, 1])
    for i in range(5):
        _, state = extend(state, later(LENGTHS + i))
    _, whole = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt(LENGTHS + 5, 48))
    np.testing.assert_array_equal(state.low, whole.low)
    np.testing.assert_array_equal(state.high, whole.high)
    np.testing.assert_array_equal(state.held(jnp.array([45, 28, 14])), np.repeat([[57], [35], [18]], 2, 1))


def test_it_grows_by_pages_and_reads_sinks():
    p = policies.parse("quest:budget=4,page=4,sinks=1")
    state = p.init(SIZES, 45, (0, 1, 2))
    assert state.k.shape[-2] == 48
    _, one = extend(layer(state), prompt())
    assert one.grow(LENGTHS, 8) is one
    one = one.grow(LENGTHS, 9)
    assert one.k.shape[-2] == 64 and one.low.shape[-2] == 16
    index, used = jax.jit(type(one)._choose)(one, later(LENGTHS).q[..., 0, :], jnp.asarray(LENGTHS))
    np.testing.assert_array_equal(index[..., 0], 0)
    assert bool(jnp.all(used))
