"""The samplers against a numpy reference that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.session import sampling
from atom_jax.typing import AtomError

V = 61
SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.7, top_k=5),
    dict(temperature=1.3, top_k=1),
    dict(temperature=1.0, top_k=V + 10),
    dict(temperature=0.8, top_p=0.5),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=2.0, min_p=0.2),
    dict(temperature=1.0, min_p=1.0),
    dict(temperature=0.9, top_k=12, top_p=0.8),
    dict(temperature=1.5, top_k=30, top_p=0.9, min_p=0.05),
]
restrict, choose = jax.jit(sampling.restrict), jax.jit(sampling.choose)


def logits(seed, rows=3):
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def reference(row, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after all restrictions, by sorting; no ties."""
    row = row.astype(np.float64) / temperature
    order = np.argsort(-row)
    if top_k:
        row[order[top_k:]] = -np.inf
    p = np.exp(row - row.max())
    p /= p.sum()
    if top_p < 1:
        fewest = int(np.sum(np.cumsum(p[order]) < top_p)) + 1
        p[order[fewest:]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_restrictions_equal_the_sorting_reference(settings):
    for seed in range(5):
        x = logits(seed)
        got = jax.nn.softmax(restrict(x, sampling.sampler(**settings)), axis=-1)
        expected = np.stack([reference(row, **settings) for row in x])
        np.testing.assert_array_equal(np.asarray(got) > 0, expected > 0)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_equal_logits_at_the_limit_stay_together():
    x = np.array([[3.0, 1.0, 1.0, 0.0]], np.float32)
    kept = restrict(x, sampling.sampler(1.0, top_k=2))
    assert (np.asarray(kept) > -np.inf).tolist() == [[True, True, True, False]]


def test_impossible_tokens_stay_impossible():
    x = np.full((1, V), -np.inf, np.float32)
    x[0, 7] = -50.0
    for settings in SETTINGS:
        assert choose(x, sampling.row_keys(jax.random.key(0), 1), 0, sampling.sampler(**settings)) == 7


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    x = logits(0)
    x[0, [4, 9]] = 99.0
    keys = sampling.row_keys(jax.random.key(1), 3)
    got = choose(x, keys, 0, sampling.sampler(0.0, top_k=7, top_p=0.3))
    np.testing.assert_array_equal(got, x.argmax(-1))
    assert got[0] == 4


def test_draws_follow_the_probabilities():
    settings = dict(temperature=1.2, top_k=6, top_p=0.9)
    x, n = logits(3, rows=1)[:, :12], 20000
    draws = choose(np.repeat(x, n, 0), sampling.row_keys(jax.random.key(5), n), 0, sampling.sampler(**settings))
    share = np.bincount(draws, minlength=12) / n
    np.testing.assert_allclose(share, reference(x[0], **settings), atol=0.015)


def test_a_row_draws_the_same_in_any_batch_and_differently_at_every_step():
    x, how = np.zeros((4, 1000), np.float32), sampling.sampler(1.0)
    keys = sampling.row_keys(jax.random.key(2), 4)
    whole = choose(x, keys, 3, how)
    np.testing.assert_array_equal(whole, choose(x, sampling.row_keys(jax.random.key(2), 4), 3, how))
    np.testing.assert_array_equal(whole[1:2], choose(x[1:2], keys[1:2], 3, how))
    assert len(set(np.asarray(whole).tolist())) == 4
    assert np.all(np.asarray(whole) != np.asarray(choose(x, keys, 4, how)))


def test_new_settings_do_not_recompile():
    calls = 0

    def counted(*args):
        nonlocal calls
        calls += 1
        return sampling.choose(*args)

    compiled = jax.jit(counted)
    for settings in [{}, *SETTINGS]:
        compiled(logits(0), sampling.row_keys(jax.random.key(0), 3), jnp.int32(0), sampling.sampler(**settings))
    assert calls == 1


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature="0.5"), "temperature: expected a number, got a str"),
        (dict(top_k=-1), "top_k"),
        (dict(top_k=1.5), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(min_p=-0.1), "min_p"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, word):
    with pytest.raises(AtomError, match=word):
        sampling.sampler(**settings)
