"""Chunks read by positions, and the transpose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_unpool.api import chunk_unpool
from tests.pallas_kernels.simulated import run


def case(t=300, m=140, d=5, dtype="float32"):
    rng = np.random.default_rng(0)
    read = np.sort(rng.integers(0, m, (3, t)), axis=1)
    read = np.where(rng.random((3, t)) < 0.1, -1, read)
    read[2] = -1
    x, z, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, m, d), (3, d), (3, t, d)))
    return x, jnp.asarray(read, jnp.int32), z, g


@functools.partial(jax.jit, static_argnames="implementation")
def values_and_gradients(x, read, z, g, implementation):
    y, back = jax.vjp(lambda x, z: chunk_unpool(x, read, z, implementation=implementation), x, z)
    return y, *back(g)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 4e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(300, 140, 5), (1, 1, 130)])
def test_kernel_equals_reference(shape, dtype, tolerance):
    x, read, z, g = case(*shape, dtype)
    want, got = (values_and_gradients(x, read, z, g, i) for i in ("reference", "interpret"))
    np.testing.assert_array_equal(got[0].astype(jnp.float32), want[0].astype(jnp.float32))
    for have, wanted in zip(got[1:], want[1:]):
        scale = float(jnp.abs(wanted.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            have.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance * max(scale, 1)
        )


def test_what_it_means():
    x, read, z, _ = case()
    rows = np.concatenate([np.asarray(x), np.asarray(z)[:, None]], axis=1)
    want = np.stack([row[i] for row, i in zip(rows, np.asarray(read))])
    np.testing.assert_array_equal(chunk_unpool(x, read, z), want)
    np.testing.assert_array_equal(chunk_unpool(x, read)[2], np.zeros_like(want[2]))


def test_nothing_races(capfd):
    x, read, z, _ = case()
    got = run(capfd, lambda *a: chunk_unpool(*a, implementation="tpu"), x, read, z)
    np.testing.assert_array_equal(got, chunk_unpool(x, read, z))


def test_bad_input():
    x, read, z, _ = case()
    for match, args in {
        "x_bmd: expected shape": (x[0], read),
        "read_bt: expected integer": (x, read * 1.0),
        "z_bd: expected shape": (x, read, z[:, 1:]),
        "z_bd: expected the dtype of x_bmd": (x, read, z.astype(jnp.bfloat16)),
    }.items():
        with pytest.raises(ValueError, match=match):
            chunk_unpool(*args)
