"""The recurrence over chunks, forwards and backwards, against a loop and against autodiff of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_smooth.api import chunk_smooth
from tests.pallas_kernels.simulated import run


def case(m, d=5):
    """Factors between 1e-4 and 1 - 1e-4, some of them 0; a row of ones."""
    keys = jax.random.split(jax.random.key(0), 4)
    a = jnp.clip(jax.random.uniform(keys[0], (3, m, 1)), 1e-4, 1 - 1e-4)
    a = jnp.where(jax.random.bernoulli(keys[1], 0.1, a.shape), 0.0, a).at[2].set(1.0)
    return a, *(jax.random.normal(key, (3, m, d)) for key in keys[2:])


@functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
def values_and_gradients(a, x, g, reverse, implementation):
    y, back = jax.vjp(lambda a, x: chunk_smooth(a, x, reverse, implementation=implementation), a, x)
    return y, *back(g)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_it_means(reverse):
    a, x, _ = case(9)
    want, now = np.zeros(x.shape), np.zeros((3, 5))
    for j in range(8, -1, -1) if reverse else range(9):
        now = want[:, j] = np.asarray(a[:, j]) * now + np.asarray(x[:, j])
    np.testing.assert_allclose(chunk_smooth(a, x, reverse), want, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("m", [1, 130])
def test_kernel_equals_reference(m, reverse):
    want, got = (values_and_gradients(*case(m), reverse, i) for i in ("reference", "interpret"))
    for have, wanted in zip(got, want):
        scale = max(1.0, float(jnp.abs(wanted).max()))
        np.testing.assert_allclose(have, wanted, atol=2e-6 * scale)


def test_nothing_races(capfd):
    a, x, _ = case(130)
    got = run(capfd, lambda a, x: chunk_smooth(a, x, implementation="tpu"), a, x)
    np.testing.assert_allclose(got, chunk_smooth(a, x), atol=5e-5)


def test_bad_input():
    a, x, _ = case(3)
    for match, args in {
        "x_bmd: expected shape": (a, x[0]),
        "a_bm1: expected shape": (a[:, 1:], x),
        "x_bmd: expected float32, got bfloat16": (a, x.astype(jnp.bfloat16)),
    }.items():
        with pytest.raises(ValueError, match=match):
            chunk_smooth(*args)
