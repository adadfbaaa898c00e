"""Compact convolutional transformers, with and without fewer tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.models import cct
from atom_jax.reduction.pool import Pool
from atom_jax.reduction.todre import ToDRE
from atom_jax.reduction.tome import ToMe
from atom_jax.typing import AtomError

CFG = cct.examples()["gray"]


@pytest.fixture(scope="module")
def model():
    return params.init(jax.random.key(0), cct.spec(CFG)), jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))


def test_convolutions_and_pooling_by_hand(model):
    p, image = model
    kernel, x = np.asarray(p["stem"]["0"]), np.pad(np.asarray(image), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [[np.einsum("bijc,ijcd->bd", x[:, i : i + 3, j : j + 3], kernel) for j in range(8)] for i in range(8)]
    found = np.maximum(np.array(rows).transpose(2, 0, 1, 3), 0)
    # The greatest of 3 x 3 at every second place; "SAME" begins with the first pixel.
    cells = [[found[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 8, 2)] for i in range(0, 8, 2)]
    expected = np.array(cells).transpose(2, 0, 1, 3).reshape(3, 16, 16) + np.asarray(p["positions"])
    np.testing.assert_allclose(cct.embed(p, image, CFG), expected, atol=1e-5)


def test_reducers_that_do_nothing_change_nothing(model):
    p, image = model
    plain, none = jax.jit(
        lambda p, x: (cct.classify(p, x, CFG), cct.classify(p, x, CFG, (ToMe(0), None), proportional=False))
    )(p, image)
    assert plain.logits.shape == (3, 10) and plain.logits.dtype == jnp.float32
    np.testing.assert_allclose(plain.logits, none.logits, atol=1e-6)


def test_tokens_of_every_layer_are_counted(model):
    p, image = model
    reducers = (ToMe(6), ToDRE(4))
    found = jax.eval_shape(lambda p, x: cct.classify(p, x, CFG, reducers), p, image)
    assert cct.left(CFG, reducers) == [10, 4] and found.size.shape == (3, 4)
    assert cct.left(CFG) == [16, 16]
    # By hand: without reducers, then with a pool whose products are none.
    d, f, n = 16, 24, 16
    stem, end = 2 * 64 * 9 * d, 4 * n * d + 2 * d * 10
    layer = lambda n, m: 2 * n * 4 * d * d + 4 * n * n * d + 2 * m * 2 * d * f  # noqa: E731
    assert cct.image_flops(CFG) == stem + 2 * layer(n, n) + end
    pooled = stem + layer(n, 4) + layer(4, 4) + 4 * 4 * d + 2 * d * 10
    assert cct.image_flops(CFG, (Pool(2, 2), None)) == pooled
    assert cct.image_flops(CFG, (ToMe(8), None)) == stem + layer(n, 8) + layer(8, 8) + 4 * 8 * d + 320 + 2 * 8 * 8 * 8


def test_what_does_not_fit_is_said(model):
    p, image = model
    with pytest.raises(AtomError, match=r"expected images of 8 x 8 x 1, got \(8, 6, 1\)"):
        cct.embed(p, image[:, :, :6], CFG)
    for changes, message in (
        ({"size": 9}, "pool: 2, 1 times, does not divide size 9"), ({"n_heads": 3}, "n_heads: 3 do not divide"),
        ({"dtype": "int8"}, "dtype: expected float32 or bfloat16"),
    ):  # fmt: skip
        with pytest.raises(AtomError, match=message):
            dataclasses.replace(CFG, **changes)
