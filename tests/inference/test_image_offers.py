"""How many tokens each image gets, of what a tokenizer offers."""

import itertools

import numpy as np
import pytest

from atom_jax.inference import image_tokens as lib
from atom_jax.inference.image_tokens import Offers
from atom_jax.typing import AtomError


def offers(errors, tokens=None):
    """Of errors [k, n]; tokens: 1 to k."""
    errors = np.array(errors, np.float32)
    tokens = np.broadcast_to(np.arange(1, len(errors) + 1)[:, None], errors.shape) if tokens is None else tokens
    return Offers(np.array(tokens), errors, np.zeros((*errors.shape, 1, 1, 1)), None)


def test_the_fewest_tokens_within_an_error_also_where_errors_rise():
    found = offers([[0.5, 0.2, 0.9], [0.3, 0.4, 0.8], [0.4, 0.1, 0.7], [0.1, 0.1, 0.8]])
    assert lib.within(found, 0.3).tolist() == [1, 0, 2]  # equal is enough; out of reach: the smallest error
    assert lib.within(found, 0.1).tolist() == [3, 2, 2]
    assert lib.tokens_of(found, np.array([3, 2, 2])).tolist() == [4, 3, 3]


def test_at_most_so_many_tokens():
    found = offers([[0.5, 0.2], [0.6, 0.1]], tokens=[[2, 2], [4, 3]])
    assert lib.at_most(found, 4).tolist() == [1, 1] and lib.at_most(found, 2).tolist() == [0, 0]
    with pytest.raises(AtomError, match="tokens is 1: this tokenizer offers 2 to 4"):
        lib.at_most(found, 1)


def test_of_offers_with_equal_tokens_the_best_is_taken():
    found = offers([[0.5, 0.4], [0.3, 0.5], [0.4, 0.6]], tokens=[[2, 2], [2, 2], [3, 3]])
    assert lib.at_most(found, 2).tolist() == [1, 0] == lib.within(found, 0.6).tolist()
    assert lib.by_gain(found, 2).tolist() == [1, 0]


def test_the_bound_has_the_mean_and_no_smaller_one_has():
    rng = np.random.default_rng(0)
    found = offers(-np.sort(-rng.random((8, 50)), axis=0))
    for mean in (1, 3, 5.5, 8):
        bound = lib.threshold(found, mean)
        assert lib.tokens_of(found, lib.within(found, bound)).mean() <= mean
        smaller = found.errors[found.errors < bound]
        if smaller.size:
            assert lib.tokens_of(found, lib.within(found, smaller.max())).mean() > mean


def test_tokens_go_where_they_help_most():
    rng = np.random.default_rng(1)
    # Steps that get smaller: then no allocation is better.
    found = offers(5 - np.cumsum(-np.sort(-rng.random((4, 4)), axis=0), axis=0))
    for mean in (1, 1.5, 2.75, 4):
        at = lib.by_gain(found, mean)
        assert lib.tokens_of(found, at).sum() == mean * 4
        best = min(
            found.errors[list(choice), range(4)].sum()
            for choice in itertools.product(range(4), repeat=4)
            if sum(choice) + 4 <= mean * 4
        )
        np.testing.assert_allclose(lib.errors_of(found, at).sum(), best, rtol=1e-6)
    with pytest.raises(AtomError, match="tokens is 0: the fewest that these images can have are 1 on average"):
        lib.by_gain(found, 0)
    # A token that does not help alone is taken with the next one; one that never does, not at all.
    assert lib.by_gain(offers([[1.0, 1.0], [1.0, 0.9], [0.2, 0.9]]), 2).tolist() == [2, 0]
