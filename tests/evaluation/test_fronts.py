"""Fronts of accuracy over cost, and gaps between them."""

import numpy as np
import pytest

from atom_jax.evaluation import fronts
from atom_jax.evaluation.fronts import Points


def test_the_front_is_what_nothing_beats():
    accuracy, cost = np.array([0.5, 0.4, 0.6, 0.6, 0.7]), np.array([2.0, 3.0, 4.0, 5.0, 8.0])
    assert fronts.front(accuracy, cost).tolist() == [0, 2, 4]


def test_areas_between_steps_and_lines():
    a = np.array([0.4, 0.8]), np.array([1.0, 4.0])
    b = np.array([0.2, 0.6]), np.array([1.0, 2.0])
    # Both reach costs from 1 to 2: 0.4 against 0.2 there.
    assert fronts.area(a, b) == pytest.approx(0.2)
    # Lines: 0.4 to 0.6 against 0.2 to 0.6.
    assert fronts.area(a, b, linear=True) == pytest.approx(0.1)
    assert np.isnan(fronts.area(a, (np.array([1.0]), np.array([8.0]))))


def points(rng, better=0.0, n=80):
    chance = np.array([0.2, 0.4, 0.6])[:, None] + better
    return Points((rng.random((3, n)) < chance).astype(float), np.array([[1.0], [2.0], [4.0]]).repeat(n, 1))


def test_a_policy_is_no_better_than_itself():
    one = points(np.random.default_rng(0))
    gap = fronts.gap(one, one, draws=50)
    assert gap.value == gap.low == gap.high == gap.linear == 0


def test_intervals_hold_what_they_should_and_follow_the_seed():
    rng = np.random.default_rng(1)
    base, better = points(rng), points(rng, 0.3)
    gap = fronts.gap(better, base, draws=200, seed=3)
    assert 0 < gap.low < gap.value < gap.high and gap.low < 0.3 < gap.high
    assert fronts.gap(better, base, draws=200, seed=3) == gap
    assert fronts.gap(base, better, draws=200, seed=3).value == pytest.approx(-gap.value)
