"""Training-free cache policies against plain definitions, and what must hold for all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache import observe, policies
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError
from tests.kvcache import naive_policies as naive

LENGTHS = np.array([40, 23, 9])
SIZES = Sizes(layers=3, b=3, h=2, g=2, k=8, dtype=jnp.float32)
TEXTS = {
    "streaming_llm": "sinks=2", "tova": "", "h2o": "", "observed_attention": "", "snapkv": "window=6",
    "pyramidkv": "window=6,beta=3", "adakv": "window=6,floor=0.4", "knorm": "sinks=1",
    "expected_attention": "sinks=2,future=5,eps=0.01", "keydiff": "", "random": "seed=3",
    "sepllm": "sinks=1,window=3",
}  # fmt: skip
ONLINE = ("streaming_llm", "tova", "h2o", "observed_attention", "knorm", "keydiff", "sepllm")
NAMES = list(TEXTS)


def policy(name, budget="budget=12"):
    p = policies.parse(f"{name}:{budget},{TEXTS.get(name, '')}")
    return dataclasses.replace(p, separators=(2, 5)) if name == "sepllm" else p


@functools.cache
def tensors(t=60, seed=0):
    """q [3, 2, 2, t, 8], k and v [3, 2, t, 8]."""
    rng = np.random.default_rng(seed)
    shapes = ((3, 2, 2, t, 8), (3, 2, t, 8), (3, 2, t, 8))
    return tuple(rng.normal(size=s).astype(np.float32) * 1.5 for s in shapes)


def layer(state, i=1):
    """One layer of a stacked state."""
    return jax.tree.map(lambda x: x[i], state)


def prompt(lengths=LENGTHS, t=40, rows=slice(None)):
    """A first call with t columns."""
    q, k, v = (x[rows] for x in tensors())
    positions = np.tile(np.arange(t, dtype=np.int32), (len(q), 1))
    real = (positions < lengths[rows][:, None]).astype(np.int32)
    zero = jnp.zeros(len(q), jnp.int32)
    at, ids = Tokens(positions, real), naive.ids(positions)
    return Call(q[..., :t, :], k[..., :t, :], v[..., :t, :], at, zero, ids=ids, fresh=True)


def later(done, t=1, real=None, rows=slice(None)):
    """A call with the next t tokens, of which `real` (default: all) count, of rows with `done` tokens."""
    done = np.asarray(done, np.int32)
    at = done[:, None] + np.arange(t, dtype=np.int32)[None]
    q, k, v = (x[rows] for x in tensors())
    q = np.take_along_axis(q, at[:, None, None, :, None], 3)
    k, v = (np.take_along_axis(x, at[:, None, :, None], 2) for x in (k, v))
    real = np.full(len(done), t) if real is None else np.asarray(real)
    segments = (np.arange(t)[None] < real[:, None]).astype(np.int32)
    return Call(q, k, v, Tokens(at, segments), done, ids=naive.ids(at))


extend = jax.jit(lambda state, call: state.extend(call))


def sets(state, row):
    return [set(int(i) for i in pos if i >= 0) for pos in np.asarray(state.pos)[row]]


def row_of(row, length):
    q, k, v = (x[row].astype(np.float64) for x in tensors())
    return q[:, :, :length], k[:, :length], v[:, :length]


@pytest.mark.parametrize("budget", ["budget=12", "ratio=0.4"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_a_prompt_leaves_what_the_definition_keeps(name, budget):
    p = policy(name, budget)
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    for row, length in enumerate(LENGTHS):
        n = p.budget or max(int(length * p.ratio), 1)
        method = "snapkv" if name in ("pyramidkv", "adakv") else name
        score = getattr(naive, method)(p, *row_of(row, length))
        expected = naive.kept_together(p, score, n) if name == "adakv" else naive.kept(p, score, n)
        assert sets(state, row) == expected
        np.testing.assert_array_equal(state.n[row], [len(s) for s in expected])
        for a, held in enumerate(expected):
            slots = np.asarray(state.pos)[row, a, : len(held)]
            np.testing.assert_array_equal(slots, sorted(held))
            np.testing.assert_array_equal(np.asarray(state.k)[row, a, : len(held)], tensors()[1][row, a, slots])


@pytest.mark.parametrize("name", [*NAMES, "quest"])
def test_room_for_everything_is_the_dense_cache(name):
    budget = "budget=400" if name == "pyramidkv" else "budget=64"
    state, dense = layer(policy(name, budget).init(SIZES, 64, (0, 1, 2))), DenseLayer.empty(3, 2, 64, 8, jnp.float32)
    out, state = extend(state, prompt())
    want, dense = extend(dense, prompt())
    np.testing.assert_array_equal(out, want)
    for i in range(6):
        out, state = extend(state, later(LENGTHS + i))
        want, dense = extend(dense, later(LENGTHS + i))
        np.testing.assert_allclose(out, want, atol=2e-6)
    out, _ = extend(state, later(LENGTHS + 6, 8))
    want, _ = extend(dense, later(LENGTHS + 6, 8))
    np.testing.assert_allclose(out, want, atol=2e-6)


@pytest.mark.parametrize("budget", ["budget=12", "ratio=0.4"])
@pytest.mark.parametrize("name", [*NAMES, "quest"])
def test_a_row_gets_what_it_gets_alone(name, budget):
    p = policy(name, budget)
    out, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    # For a few: in buffers of its own width. Else: in other company, which is compiled already.
    own = name in ("h2o", "snapkv") and budget == "budget=12"
    rows, t = ([1], 23) if own else ([1, 1, 2], 40)
    alone, one = extend(layer(p.init(SIZES._replace(b=len(rows)), 48, (0, 1, 2))), prompt(t=t, rows=rows))
    np.testing.assert_allclose(out[1, :, :, :23], alone[0, :, :, :23], atol=2e-6)
    done = LENGTHS.copy()
    for real in ([1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 1, 0]):
        out, state = extend(state, later(done, real=real))
        alone, one = extend(one, later(done[rows], rows=rows))
        np.testing.assert_allclose(out[1], alone[0], atol=2e-6)
        done += real
    if name != "quest":
        np.testing.assert_array_equal(state.pos[1], one.pos[0])
        np.testing.assert_array_equal(state.limit[1], one.limit[0])


@pytest.mark.parametrize("name", ONLINE)
def test_single_tokens_evict_as_a_replay_on_the_whole_text_does(name):
    p = policy(name)
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    sizes = []
    replays = [naive.Replay(p, *row_of(r, n), 12) for r, n in enumerate(LENGTHS)]
    for i in range(14):
        call = later(LENGTHS + i)
        out, state = extend(state, call)
        sizes.append(extend._cache_size())
        for r, replay in enumerate(replays):
            want = replay.step(*(np.asarray(x, np.float64)[r, ..., 0, :] for x in (call.q, call.k, call.v)))
            np.testing.assert_allclose(out[r, ..., 0, :], want, atol=2e-5)
            assert sets(state, r) == replay.sets
    assert len(set(sizes)) == 1
    np.testing.assert_array_equal(state.n, state.limit)
    assert not bool(jnp.any(state.full(LENGTHS + 14)))


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_holds_and_the_newest_token_is_stored(name):
    p = policy(name)
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    for i in range(16):
        _, state = extend(state, later(LENGTHS + i))
        np.testing.assert_array_equal(jnp.max(state.pos, axis=-1), np.repeat((LENGTHS + i)[:, None], 2, 1))
        assert bool(jnp.all(state.n <= state.limit))
        np.testing.assert_array_equal(jnp.sum(state.pos >= 0, axis=-1), state.n)
    np.testing.assert_array_equal(state.n, state.limit)
    for i in range(p.sinks):
        assert bool(jnp.all(jnp.any(state.pos == i, axis=-1)))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_only_keeps_of_the_prompt_what_it_kept_and_all_that_follows(name):
    p = policy(name, "ratio=0.4")
    _, plain = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    p = dataclasses.replace(p, prompt_only=True)
    state = layer(p.init(SIZES, 48, (0, 1, 2)))
    _, state = extend(state, prompt())
    before = [sets(state, row) for row in range(3)]
    assert before == [sets(plain, row) for row in range(3)]
    for i in range(8):
        if bool(jnp.any(state.full(LENGTHS + i))):
            state = state.grow(LENGTHS + i, 1)
        call = later(LENGTHS + i)
        out, state = extend(state, call)
        for row in range(3):
            new = set(range(LENGTHS[row], LENGTHS[row] + i + 1))
            assert sets(state, row) == [held | new for held in before[row]]
            held = np.array(sorted(before[row][1] | new))
            w = naive.attention(np.asarray(call.q)[row, 1, 0, 0], tensors()[1][row, 1, held], LENGTHS[row] + i, held)
            np.testing.assert_allclose(out[row, 1, 0, 0], w @ tensors()[2][row, 1, held], atol=2e-5)


def test_prompt_only_is_not_for_a_policy_that_keeps_everything():
    with pytest.raises(AtomError, match="prompt_only is for policies that evict"):
        policies.parse("quest:ratio=0.5,prompt_only=true")


def test_tokens_after_the_prompt_replace_its_least_keys_first_then_the_oldest():
    p = policy("snapkv")
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    score = naive.snapkv(p, *row_of(0, 40))
    held = naive.kept(p, score, 12)
    for i in range(10):
        _, state = extend(state, later(LENGTHS + i))
        for a in range(2):
            places = sorted(held[a])
            held[a].remove(places[naive.least(p, [(score[a, j], j) for j in places])])
            held[a].add(40 + i)
        score = np.pad(score, ((0, 0), (0, 1)), constant_values=np.inf)
        assert sets(state, 0) == held
    assert held == [set(range(38, 50))] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_is_stored_whole_and_leaves_token_by_token(name):
    p = policy(name)
    _, state = extend(layer(p.init(SIZES, 48, (0, 1, 2))), prompt())
    limit, before = state.limit, state
    state = state.grow(LENGTHS, 7)
    assert int((state.n + 7).max()) <= state.k.shape[2]
    real = np.array([7, 0, 4])
    call = later(LENGTHS, 7, real)
    out, state = extend(state, call)
    np.testing.assert_array_equal(state.n, np.asarray(before.n) + real[:, None])
    np.testing.assert_array_equal(state.limit, limit)
    assert sets(state, 1) == sets(before, 1)
    for row in (0, 2):
        for a in range(2):
            held = np.array(sorted(sets(state, row)[a]))
            assert set(held) == sets(before, row)[a] | set(range(LENGTHS[row], LENGTHS[row] + real[row]))
            for i in range(real[row]):
                q = np.asarray(call.q)[row, a, 1, i]
                w = naive.attention(q, tensors()[1][row, a, held], LENGTHS[row] + i, held)
                np.testing.assert_allclose(out[row, a, 1, i], w @ tensors()[2][row, a, held], atol=2e-5)
    done = LENGTHS + real
    for i in range(8):
        expected = np.where(state.n > limit, state.n - 1, np.minimum(state.n + 1, limit))
        _, state = extend(state, later(done + i))
        np.testing.assert_array_equal(state.n, expected)
    np.testing.assert_array_equal(state.n, limit)


@pytest.mark.parametrize("name", [*NAMES, "quest"])
def test_nothing_changes_where_there_is_no_token(name):
    _, state = extend(layer(policy(name).init(SIZES, 48, (0, 1, 2))), prompt())
    _, after = extend(state, later(LENGTHS, real=[0, 0, 0]))
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_buffers_grow_up_to_the_limit():
    state = policy("knorm", "budget=50").init(SIZES, 40, (0, 1, 2))
    assert state.k.shape == (3, 3, 2, 40, 8)
    _, one = extend(layer(state), prompt())
    np.testing.assert_array_equal(one.full(LENGTHS), [True, False, False])
    one = one.grow(LENGTHS, 1)
    assert one.k.shape[2] == 48 and not bool(jnp.any(one.full(LENGTHS)))
    assert one.grow(LENGTHS, 5).k.shape[2] == 48 and one.grow(LENGTHS, 30).k.shape[2] == 96
    for i in range(8):
        _, one = extend(one, later(LENGTHS + i))
    assert one.grow(LENGTHS + 8, 1).k.shape[2] == 50
    full = policy("knorm", "budget=12").init(SIZES, 40, (0, 1, 2))
    _, full = extend(layer(full), prompt())
    assert full.grow(LENGTHS, 1).k.shape[2] == 12


@pytest.mark.parametrize("aligned", [True, False])
def test_received_attention_equals_its_definition(aligned):
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(1, 2, 2, 150, 8)), rng.normal(size=(1, 2, 150, 8))
    real = np.arange(150) < 140
    places = Tokens(np.arange(150)[None], real.astype(np.int32)[None])
    pos = np.tile(np.where(real, np.arange(150), -1), (1, 2, 1))
    got = observe.received(jnp.float32(q), places, jnp.float32(k), jnp.asarray(pos), aligned)
    want = naive.all_weights(q[0, :, :, :140], k[0, :, :140]).sum(2)
    np.testing.assert_allclose(got[0, :, :, :140], want, atol=1e-4)
    np.testing.assert_array_equal(got[0, :, :, 140:], 0)


def test_a_pyramid_has_the_mean_of_its_budget_and_falls():
    p = policies.parse("pyramidkv:budget=30,window=6,beta=4")
    assert p.budgets(4) == [48, 36, 24, 12] and np.mean(p.budgets(4)) == 30
    assert policies.parse("pyramidkv:budget=5").budgets(3) == [5, 5, 5]
    p = policies.parse("pyramidkv:ratio=0.5,window=6,beta=4")
    state = p.init(SIZES, 48, (0, 1, 2))
    limits = [np.asarray(extend(layer(state, i), prompt())[1].limit[:, 0]) for i in range(3)]
    np.testing.assert_array_equal(np.array(limits).T, [[30, 20, 10], [15, 11, 7], [4, 4, 4]])


def test_random_draws_differ_between_layers_and_seeds():
    seeds = {s: layer(policies.parse(f"random:budget=12,seed={s}").init(SIZES, 48, (0, 1, 2))) for s in (0, 1)}
    states = [extend(seeds[s], prompt().replace(layer=i))[1] for s, i in ((0, 0), (0, 1), (1, 0), (0, 0))]
    first = sets(states[0], 0)
    assert first == sets(states[3], 0)
    assert len({frozenset(x) for x in (*first, sets(states[1], 0)[0], sets(states[2], 0)[0])}) == 4
