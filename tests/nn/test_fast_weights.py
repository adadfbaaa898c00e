"""Fast weights against numbers of lmtool-fwp (tests/golden/lasting), and chunks against single positions."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn.fast_weights import fast_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lasting" / "fast_weights.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_official_numbers_in_chunks_and_from_a_state(golden, rule):
    q, k, v = (golden[name][:, :, None] for name in "qkv")
    beta = golden["beta"] if rule == "delta" else None
    run = jax.jit(fast_weights, static_argnames="chunk")
    document, zero = jnp.zeros((2, 9), jnp.int32), jnp.zeros((2, 1, 5, 5))
    y, w = run(q, k, v, beta, document, zero, chunk=4)
    np.testing.assert_allclose(y[:, :, 0], golden[f"y_{rule}"], atol=1e-5)
    np.testing.assert_allclose(w[:, 0], golden[f"w_{rule}"], atol=1e-5)
    at, rest = slice(5), slice(5, None)
    cut = lambda part: (x if x is None else x[:, part] for x in (q, k, v, beta, document))  # noqa: E731
    first, w = run(*cut(at), zero, chunk=4)
    second, w = run(*cut(rest), w, chunk=4)
    np.testing.assert_allclose(np.concatenate([first, second], 1)[:, :, 0], golden[f"y_{rule}"], atol=1e-5)
    np.testing.assert_allclose(w[:, 0], golden[f"w_{rule}"], atol=1e-5)


def test_documents_start_anew_and_the_gradient_is_that_of_single_positions(golden):
    q, k, v = (jnp.asarray(golden[name][:, :, None]) for name in "qkv")
    beta = jnp.asarray(golden["beta"])
    document = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9], jnp.int32)
    start = jax.random.normal(jax.random.key(0), (2, 1, 5, 5))

    def chunks(q, k, v, beta, w):
        return fast_weights(q, k, v, beta, document, w, 4)

    def singly(q, k, v, beta, w):
        out = []
        for t in range(9):
            begins = document[:, t] != (document[:, t - 1] if t else 0)
            w = jnp.where(begins[:, None, None, None], 0.0, w)
            old = jnp.einsum("bhvk,bhk->bhv", w, k[:, t])
            w = w + jnp.einsum("bhv,bhk->bhvk", beta[:, t, :, None] * (v[:, t] - old), k[:, t])
            out.append(jnp.einsum("bhvk,bhk->bhv", w, q[:, t]))
        return jnp.stack(out, 1), w

    def loss(form):
        found, back = jax.vjp(jax.jit(form), q, k, v, beta, start)
        return *found, *back(jax.tree.map(jnp.cos, found))

    for found, expected in zip(loss(chunks), loss(singly), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
