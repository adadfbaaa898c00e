"""Pooling of chunks, values and gradients, against a loop over chunks and against autodiff of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_pool.api import HOW, chunk_pool
from tests.pallas_kernels.simulated import run

M = 140


def rows(t=300, d=5, dtype="float32"):
    """Chunks of length zero, one and more; a row of one chunk; a row without any. Values tie."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.sort(rng.integers(0, M + 1, t)), np.full(t, 3), np.full(t, M)])
    x = jnp.asarray(rng.normal(size=(3, t, d)).round(1), dtype)
    return x, jnp.asarray(ids, jnp.int32), jnp.asarray(rng.random((3, t)) < 0.8)


@functools.partial(jax.jit, static_argnames=("how", "implementation", "m"))
def values_and_gradient(x, ids, inside, g, how, implementation, m=M):
    def finite(x):
        u, count = chunk_pool(x, ids, m, how, inside, implementation=implementation)
        return jnp.where(jnp.isfinite(u), u, -7).astype(jnp.float32), count

    u, back, count = jax.vjp(finite, x, has_aux=True)
    return u, back(g)[0], count


@pytest.mark.parametrize("how", HOW)
def test_what_it_means(how):
    x, ids, inside = rows()
    u, count = chunk_pool(x, ids, M, how, inside)
    one = {"sum": np.sum, "mean": np.mean, "max": np.max}
    one |= {"first": lambda own, axis: own[0], "last": lambda own, axis: own[-1]}
    for b, chunk in ((0, 17), (0, 40), (0, 139), (1, 3), (1, 4), (2, 0)):
        own = np.asarray(x)[b][np.asarray((ids[b] == chunk) & inside[b])]
        assert count[b, chunk] == len(own)
        want = one[how](own, axis=0) if len(own) else -np.inf if how == "max" else 0
        np.testing.assert_allclose(u[b, chunk], want, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("how", HOW)
def test_kernel_equals_reference(how, dtype, tolerance):
    x, ids, inside = rows(dtype=dtype)
    g = jax.random.normal(jax.random.key(1), (3, M, 5))
    want, got = (values_and_gradient(x, ids, inside, g, how, i) for i in ("reference", "interpret"))
    for have, wanted in zip(got, want):
        have, wanted = have.astype(jnp.float32), wanted.astype(jnp.float32)
        np.testing.assert_allclose(have, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_one_position_and_one_chunk(how):
    x, ids, inside = jnp.full((1, 1, 130), 2.0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    u, to_x, _ = values_and_gradient(x, ids, inside, jnp.full((1, 1, 130), 3.0), how, "interpret", m=1)
    np.testing.assert_array_equal(u, x)
    np.testing.assert_array_equal(to_x, 1.5 * x)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_nothing_races(how, capfd):
    x, ids, inside = rows()
    got = run(capfd, lambda x: chunk_pool(x, ids, M, how, inside, implementation="tpu")[0], x)
    np.testing.assert_allclose(got, chunk_pool(x, ids, M, how, inside)[0], atol=2e-6, rtol=2e-6)


def test_bad_input():
    x, ids, _ = rows()
    for match, args in {
        "x_btd: expected shape": (x[0], ids, M, "sum"),
        "ids_bt: expected shape": (x, ids[:, 1:], M, "sum"),
        "ids_bt: expected integer": (x, ids * 1.0, M, "sum"),
        "how: expected one of sum, mean": (x, ids, M, "median"),
        "at least one chunk": (x, ids, 0, "sum"),
    }.items():
        with pytest.raises(ValueError, match=match):
            chunk_pool(*args)
