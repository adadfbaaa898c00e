"""mLSTM against the recurrence, and against numbers of Bolmo's official code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels.mlstm_chunk.api import mlstm_chunk
from tests.pallas_kernels.simulated import run

forward = jax.jit(mlstm_chunk, static_argnames=("chunk", "implementation"))


def case(t, k=8, v=16, dtype="float32"):
    """Two rows of two heads and several documents, whose first continues a state."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    documents = jnp.asarray(np.cumsum(rng.random((2, t)) < 0.03, axis=1), jnp.int32)
    state = (normal(2, 2, k, v), normal(2, 2, k), normal(2, 2))
    qkv = [normal(2, 2, t, size, dtype=dtype) for size in (k, k, v)]
    return *qkv, 3 * normal(2, 2, t), jax.nn.log_sigmoid(2 * normal(2, 2, t) + 2), documents, state


def recurrence(q, k, v, gate, forget, documents, state):
    """Outputs, their denominators and the state."""
    q, k, v, gate, forget, documents = (np.asarray(a, np.float64) for a in (q, k, v, gate, forget, documents))
    (c, n, m), before = (np.asarray(a, np.float64) for a in state), np.zeros(2)
    h, below = np.zeros(v.shape), np.zeros(gate.shape)
    for t in range(q.shape[2]):
        same = (documents[:, t] == before)[:, None]
        before = documents[:, t]
        c, n, m = c * same[..., None, None], n * same[..., None], m * same
        new = np.maximum(forget[:, :, t] + m, gate[:, :, t])
        keep, enter = np.exp(forget[:, :, t] + m - new)[..., None], np.exp(gate[:, :, t] - new)[..., None]
        c = keep[..., None] * c + enter[..., None] * k[:, :, t, :, None] * v[:, :, t, None]
        n, m = keep * n + enter * k[:, :, t], new
        scaled = q[:, :, t] / np.sqrt(q.shape[-1])
        below[:, :, t] = np.maximum(np.abs((scaled * n).sum(-1)), np.exp(-m)) + 1e-6
        h[:, :, t] = np.einsum("bhk,bhkv->bhv", scaled, c) / below[:, :, t, None]
    return h, below[..., None], (c, n, m)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("t", [1, 150])
def test_recurrence(t, dtype, tolerance, implementation):
    args = case(t, dtype=dtype)
    h, below, state = recurrence(*args)
    got, after = forward(*args, chunk=32, implementation=implementation)
    # A small denominator magnifies the error of the products that meet in it.
    np.testing.assert_allclose(got * below, h * below, atol=tolerance * np.abs(h * below).max())
    for have, want in zip(after, state):
        np.testing.assert_allclose(have, want, atol=tolerance * np.abs(want).max())


@pytest.fixture(scope="module")
def official(golden):
    return jax.tree.map(jnp.asarray, load_file(golden / "bolmo" / "mlstm_kernel.safetensors"))


@functools.partial(jax.jit, static_argnames="implementation")
def from_nothing(q, k, v, i, f, implementation):
    b, h, t, size = q.shape
    state = (jnp.zeros((b, h, size, v.shape[3])), jnp.zeros((b, h, size)), jnp.zeros((b, h)))
    documents = jnp.zeros((b, t), jnp.int32)
    return mlstm_chunk(q, k, v, i, jax.nn.log_sigmoid(f), documents, state, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_official_values(official, implementation):
    w = official
    h, (c, n, m) = from_nothing(*(w[x] for x in "qkvif"), implementation)
    np.testing.assert_allclose(h, w["h"], atol=1e-4, rtol=2e-5)
    for have, want in ((c, w["c"]), (n, w["n"]), (m, w["m"][..., 0])):
        np.testing.assert_allclose(have, want, atol=2e-5)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_official_gradients(official, implementation):
    w = official

    def loss(*parts):
        return jnp.sum(from_nothing(*parts, implementation)[0] * w["train_w"])

    got = jax.jit(jax.grad(loss, argnums=range(5)))(*(w[f"train_{x}"] for x in "qkvif"))
    for name, have in zip("qkvif", got):
        want = w[f"train_d{name}"]
        np.testing.assert_allclose(have, want, atol=5e-5 * float(jnp.abs(want).max()), err_msg=name)


def test_positions_that_do_not_count():
    """A gate of -1e30 keeps a position out, and a forget gate of 0 lets nothing fade."""
    q, k, v, gate, forget, documents, state = case(20)
    documents = jnp.zeros_like(documents)
    gate, forget = gate.at[:, :, 12:].set(-1e30), forget.at[:, :, 12:].set(0.0)
    short = forward(*(x[:, :, :12] for x in (q, k, v, gate, forget)), documents[:, :12], state)[1]
    for have, want in zip(forward(q, k, v, gate, forget, documents, state, implementation="interpret")[1], short):
        np.testing.assert_allclose(have, want, atol=2e-6)


def test_nothing_races(capfd):
    args = case(150)
    got = run(capfd, lambda *a: mlstm_chunk(*a, implementation="tpu"), *args)
    h, below, state = recurrence(*args)
    np.testing.assert_allclose(got[0] * below, h * below, atol=2e-5 * np.abs(h * below).max())
    np.testing.assert_allclose(got[1][0], state[0], atol=2e-5 * np.abs(state[0]).max())


def test_bad_input():
    args = case(3)
    for match, i, bad in (
        ("q_bhtk: expected shape", 0, args[0][0]),
        ("v_bhtv: expected shape", 2, args[2][:, :, 1:]),
        ("forget_bht: expected float32", 4, args[4].astype(jnp.bfloat16)),
        ("documents_bt: expected integer", 5, args[5] * 1.0),
        ("state n: expected shape", 6, (args[6][0], args[6][1][..., 1:], args[6][2])),
    ):
        with pytest.raises(ValueError, match=match):
            mlstm_chunk(*args[:i], bad, *args[i + 1 :])
