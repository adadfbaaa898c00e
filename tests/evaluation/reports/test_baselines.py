"""The two baselines: known cases, a slow reference, and their numbers on the novels."""

import numpy as np
import pytest

from atom_jax.data.sources import open_source
from atom_jax.evaluation.reports.baselines import ngram_bits_per_byte, ngram_probabilities, xz_bits_per_byte


def novel(split, limit=None):
    return b"".join(open_source("austen", split).texts)[:limit]


def test_repeating_the_training_text_costs_almost_nothing():
    text = novel("validation", 20_000)
    assert xz_bits_per_byte(text, text) < 0.03
    assert ngram_bits_per_byte(text, text) < 1.3


def test_noise_costs_eight_bits():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    assert 7.95 < xz_bits_per_byte(b"", noise) < 8.1
    assert 7.9 < ngram_bits_per_byte(noise[:10_000], noise[10_000:]) < 10


@pytest.mark.parametrize("order", [0, 1, 3, 5])
@pytest.mark.parametrize("train", [b"a", b"ab", b"abracadabra abracadabra", b"the cat sat on the mat. " * 9])
def test_probabilities_sum_to_one(train, order):
    for context in (b"", b"a", b"cadab", b"on the", b"zzzzzz"):
        total = sum(ngram_probabilities(train, context + bytes([b]), order)[-1] for b in range(256))
        assert abs(total - 1) < 1e-9


def test_ngram_looks_at_no_later_byte():
    train = novel("train", 30_000)
    a, b = (
        ngram_probabilities(train, b"the same start, then this", 5),
        ngram_probabilities(train, b"the same start", 5),
    )
    np.testing.assert_array_equal(a[: len(b)], b)


def test_longer_contexts_help_on_prose():
    train, text = novel("train", 400_000), novel("validation", 40_000)
    bits = [ngram_bits_per_byte(train, text, order) for order in (0, 1, 3, 5)]
    assert bits == sorted(bits, reverse=True)
    assert 4 < bits[0] < 5 and bits[-1] < 2.4
