"""Mamba-2's scan against the recurrence, and the kernel against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd_chunk.api import ssd_chunk
from tests.pallas_kernels.simulated import run


def case(t, h=3, k=16, n=8, dtype="float32"):
    """Two rows of several documents, whose first continues a state."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    dt = jax.nn.softplus(normal(2, t, h))
    documents = jnp.asarray(np.cumsum(rng.random((2, t)) < 0.03, axis=1), jnp.int32)
    x, b, c = normal(2, t, h, k, dtype=dtype), normal(2, t, n, dtype=dtype), normal(2, t, n, dtype=dtype)
    return x, dt, -0.1 * dt, b, c, documents, normal(2, h, k, n)


def recurrence(x, dt, decay, b, c, documents, s):
    x, dt, decay, b, c, documents, s = (np.asarray(a, np.float64) for a in (x, dt, decay, b, c, documents, s))
    y, before = np.zeros(x.shape), np.zeros(2)
    for t in range(x.shape[1]):
        s = s * (documents[:, t] == before)[:, None, None, None]
        before = documents[:, t]
        new = np.einsum("bhk,bn->bhkn", x[:, t] * dt[:, t, :, None], b[:, t])
        s = np.exp(decay[:, t])[..., None, None] * s + new
        y[:, t] = np.einsum("bhkn,bn->bhk", s, c[:, t])
    return y, s


forward = jax.jit(ssd_chunk, static_argnames=("chunk", "implementation"))


def close(got, want, tolerance):
    for have, wanted in zip(got, want):
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(have, wanted, atol=tolerance * scale)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(("t", "h", "k", "n"), [(1, 1, 4, 8), (150, 3, 16, 8), (130, 2, 200, 16)])
def test_recurrence(t, h, k, n, dtype, tolerance, implementation):
    args = case(t, h, k, n, dtype)
    close(forward(*args, chunk=32, implementation=implementation), recurrence(*args), tolerance)


def test_gradients():
    args = case(40)
    documents = args[5]
    g = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), forward(*args))

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(floats, implementation):
        def run(floats):
            return ssd_chunk(*floats[:5], documents, floats[5], chunk=16, implementation=implementation)

        return jax.vjp(run, floats)[1](g)[0]

    floats = (*args[:5], args[6])
    close(gradients(floats, "interpret"), gradients(floats, "reference"), 2e-5)


def test_nothing_races(capfd):
    args = case(150)
    close(run(capfd, lambda *a: ssd_chunk(*a, implementation="tpu"), *args), recurrence(*args), 2e-6)


def test_bad_input():
    args = case(3)
    for match, i, bad in (
        ("x_bthk: expected shape", 0, args[0][0]),
        ("dt_bth: expected float32", 1, args[1].astype(jnp.bfloat16)),
        ("c_btn: expected shape", 4, args[4][:, 1:]),
        ("x_bthk, b_btn, c_btn: expected one dtype", 3, args[3].astype(jnp.bfloat16)),
        ("documents_bt: expected integer", 5, args[5] * 1.0),
        ("s_bhkn: expected shape", 6, args[6][1:]),
    ):
        with pytest.raises(ValueError, match=match):
            ssd_chunk(*args[:i], bad, *args[i + 1 :])
