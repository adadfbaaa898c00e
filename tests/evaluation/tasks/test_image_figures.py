"""Figures of the task images, on numbers that are known."""

import numpy as np

from atom_jax.evaluation.tasks import images
from atom_jax.inference.image_tokens import Offers


def test_structural_similarity():
    rng = np.random.default_rng(0)
    a = rng.random((2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(images.ssim(a, a), 1, atol=1e-6)
    # Of even images only their brightness differs.
    flat = images.ssim(np.full((1, 8, 8, 1), 0.2), np.full((1, 8, 8, 1), 0.6))
    np.testing.assert_allclose(flat, (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), atol=1e-6)
    near, far = (images.ssim(a, np.clip(a + noise * rng.standard_normal(a.shape), 0, 1)) for noise in (0.05, 0.5))
    assert (near > far).all() and (near < 1).all()


def test_ways_to_share_tokens_are_compared_at_the_same_mean():
    # Two images that one token is enough for, and two that need all.
    errors = np.array([[0.1, 0.1, 0.9, 0.8], [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]])
    tokens = np.broadcast_to(np.arange(1, 4)[:, None], (3, 4))
    found = Offers(tokens, errors, np.zeros((3, 4, 2, 2, 1)), None)
    ways = images.allocations(found, 2)
    assert {name: list(tokens[at, range(4)]) for name, at in ways.items()} == {
        "same": [2, 2, 2, 2], "adaptive": [1, 1, 3, 3], "gain": [1, 1, 3, 3]
    }  # fmt: skip
    assert images.spread(found, ways["adaptive"], np.array([0, 0, 5, 6])) == {"0": 1.0, "5": 3.0, "6": 3.0}
    assert list(images.worst(np.arange(30.0))) == [27, 28, 29]
