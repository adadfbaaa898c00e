"""Mamba-2's scan against the recurrence, and the kernel against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd_chunk.api import ssd_chunk
from tests.pallas_kernels.simulated import run


def case(t, h=3, k=16, n=8, dtype="float32", starts=None):
    """Two rows of several documents (which begin at `starts`, or somewhere), whose first continues a state."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    dt = jax.nn.softplus(normal(2, t, h))
    begins = rng.random((2, t)) < 0.03 if starts is None else np.isin(np.arange(t), starts)[None].repeat(2, 0)
    documents = jnp.asarray(np.cumsum(begins, axis=1), jnp.int32)
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


def scan(floats, documents):
    """`recurrence` for autodiff."""

    def one(carry, now):
        (s, before), (x, dt, decay, b, c, document) = carry, now
        s = jnp.where((document == before)[:, None, None, None], s, 0.0)
        s = jnp.exp(decay)[..., None, None] * s + jnp.einsum("bhk,bn->bhkn", x * dt[..., None], b)
        return (s, document), jnp.einsum("bhkn,bn->bhk", s, c)

    *moving, s = (a.astype(jnp.float32) for a in floats)
    inputs = [jnp.moveaxis(a, 1, 0) for a in (*moving, documents)]
    (s, _), y = jax.lax.scan(one, (s, jnp.zeros(2, documents.dtype)), inputs)
    return jnp.moveaxis(y, 0, 1), s


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(args, g, implementation):
    """Of every float, from those of outputs and state."""
    floats, documents = (*args[:5], args[6]), args[5]

    def run(floats):
        if implementation is None:
            return scan(floats, documents)
        return ssd_chunk(*floats[:5], documents, floats[5], chunk=64, implementation=implementation)

    return jax.vjp(run, floats)[1](g)[0]


# A few positions; a state for every block and none; documents that begin inside of blocks, at their borders and next
# to them; heads that fill several tiles, or need several steps.
SHAPES = [
    (1, 1, 4, 8, ()),
    (300, 3, 16, 8, ()),
    (300, 3, 16, 8, (5, 70, 200)),
    (300, 3, 16, 8, (128, 256)),
    (300, 3, 16, 8, (1, 127, 129, 255, 299)),
    (130, 2, 200, 130, None),
    (130, 18, 64, 8, None),
]


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype, tolerance, implementation):
    args = case(*shape[:4], dtype, shape[4])
    g = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), forward(*args))
    got = gradients(args, g, implementation)
    assert [a.dtype for a in got] == [a.dtype for a in (*args[:5], args[6])]
    close([a.astype(jnp.float32) for a in got], gradients(args, g, None), tolerance)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_gradients_where_nothing_decays(implementation):
    args = list(case(150))
    args[1], args[2] = (a.at[:, 20:60].set(0.0) for a in args[1:3])
    args[2] = args[2].at[:, 100:].set(0.0)
    g = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), forward(*args))
    close(gradients(args, g, implementation), gradients(args, g, None), 5e-6)


def test_nothing_races(capfd):
    args = case(150)
    close(run(capfd, lambda *a: ssd_chunk(*a, implementation="tpu"), *args), recurrence(*args), 2e-6)
    g = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), forward(*args))
    close(run(capfd, lambda *a: gradients(*a, "tpu"), args, g), gradients(args, g, None), 5e-6)


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
