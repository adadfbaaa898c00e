"""States that are mixed in against numbers of the official kNN-LM (tests/golden/lasting), and against plain sums."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import neighbours
from atom_jax.nn.neighbours import Datastore, Neighbours
from atom_jax.typing import AtomError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lasting" / "knn_lm.npz"
MIXED = jax.jit(neighbours.mixed)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def mixed(golden, store, b=1):
    """Log-probabilities [7, v] of the golden queries, in rows of equal length."""
    logits, x = (golden[name].reshape(b, 7 // b, -1) for name in ("lm_logprobs", "queries"))
    return np.asarray(MIXED(logits, x, store)).reshape(7, -1)


@pytest.mark.parametrize("block", [40, 16])
def test_official_numbers(golden, block, monkeypatch):
    z = golden
    monkeypatch.setattr(neighbours, "BLOCK", block)
    official = Neighbours(nearest=8, temperature=1, weight=float(z["lmbda"]))
    store = Datastore.of(z["keys"], z["values"], official, 40)
    distance, index = neighbours.nearest(store.keys, store.lengths, z["queries"], 8)
    np.testing.assert_array_equal(index, z["neighbours"])
    np.testing.assert_allclose(-distance, z["neg_l2"], atol=1e-5)
    found = mixed(z, store)
    at = np.arange(7), z["targets"]
    np.testing.assert_allclose(found[at], z["combined"], atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-6)
    # What the neighbours say alone; of a token that none of them has, nothing (there: 10,000 nats).
    alone = mixed(z, store.replace(weight=jnp.float32(1)))[at]
    there = z["knn_logprob"] > -1000
    np.testing.assert_allclose(alone[there], z["knn_logprob"][there], atol=1e-5)
    assert there.any() and np.isneginf(alone[~there]).all()


def test_masses_add_up_and_no_weight_is_the_model(golden, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 4)
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    keys, own = golden["keys"].astype(np.float16), jax.nn.log_softmax(golden["lm_logprobs"] * 3, axis=-1)
    z = golden | {"lm_logprobs": golden["lm_logprobs"] * 3}
    how = Neighbours(nearest=50, weight=0.3)
    store = Datastore.of(keys, golden["values"], how, 64)
    # More neighbours than there are states: all of them count, and nothing where there is none.
    d = np.square(golden["queries"][:, None] - keys[None].astype(np.float64)).sum(-1)
    each = np.square(keys[:, None].astype(np.float64) - keys[None]).sum(-1)
    np.fill_diagonal(each, np.inf)
    temperature = 0.3 * np.median(each.min(1))
    np.testing.assert_allclose(store.temperature, temperature, rtol=1e-4)
    w = np.exp(-(d - d.min(1, keepdims=True)) / temperature)
    said = np.stack([np.bincount(golden["values"], row, 11) for row in w / w.sum(1, keepdims=True)])
    found = mixed(z, store)
    np.testing.assert_allclose(np.exp(found), 0.7 * np.exp(own) + 0.3 * said, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(mixed(z, store.replace(weight=jnp.float32(0))), own)
    # Each of seven rows as in one of seven queries.
    np.testing.assert_allclose(mixed(z, store, b=7), found, atol=1e-5)
    assert Datastore.of(keys[:1], golden["values"][:1], how, 16).temperature == np.float32(0.3)
    # What was read twice says nothing of how far states are apart.
    twice = Datastore.of(np.concatenate([keys, keys]), np.tile(golden["values"], 2), how, 96)
    np.testing.assert_allclose(twice.temperature, temperature, rtol=1e-4)


def test_what_exists_at_once_does_not_grow_with_queries_times_states(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 4)
    monkeypatch.setattr(neighbours, "BLOCK", 32)
    n, m, d, v = 96, 128, 4, 5
    store = Datastore.of(np.ones((m, d), np.float16), np.zeros(m), Neighbours(nearest=8, temperature=1), m)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (x.aval.size for x in eqn.outvars)
            for inner in jax.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    x = jnp.zeros((n, d))
    for made in (
        jax.make_jaxpr(neighbours.mixed)(jnp.zeros((1, n, v)), x[None], store),
        jax.make_jaxpr(lambda store, x: store.find(x))(store, x),
    ):
        assert max(sizes(made.jaxpr)) <= max(n * 8, m * d) < n * 32


def test_settings_out_of_range():
    for field, value in (("nearest", 0), ("weight", 1.5), ("temperature", -1)):
        with pytest.raises(AtomError, match=f"{field}: expected a"):
            dataclasses.replace(Neighbours(), **{field: value})
