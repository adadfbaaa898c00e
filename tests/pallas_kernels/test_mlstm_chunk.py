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


def case(t, k=8, v=16, dtype="float32", starts=None):
    """Two rows of two heads and several documents (which begin at `starts`, or somewhere), whose first continues a
    state."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    begins = rng.random((2, t)) < 0.03 if starts is None else np.isin(np.arange(t), starts)[None].repeat(2, 0)
    documents = jnp.asarray(np.cumsum(begins, axis=1), jnp.int32)
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


def scan(floats, documents, state):
    """`recurrence` for autodiff, whose gradient goes through m as well."""

    def one(carry, now):
        (c, n, m, before), (q, k, v, gate, forget, document) = carry, now
        same = (document == before)[:, None]
        c, n, m = (jnp.where(same.reshape(2, *[1] * (a.ndim - 1)), a, 0.0) for a in (c, n, m))
        new = jnp.maximum(forget + m, gate)
        keep, enter = jnp.exp(forget + m - new)[..., None], jnp.exp(gate - new)[..., None]
        c = keep[..., None] * c + (enter * k)[..., None] * v[:, :, None]
        n = keep * n + enter * k
        q = q * q.shape[-1] ** -0.5
        below = jnp.maximum(jnp.abs((q * n).sum(-1)), jnp.exp(-new)) + 1e-6
        return (c, n, new, document), jnp.einsum("bhk,bhkv->bhv", q, c) / below[..., None]

    inputs = (*(jnp.moveaxis(a.astype(jnp.float32), 2, 0) for a in floats), documents.T)
    (*state, _), h = jax.lax.scan(one, (*state, jnp.zeros(2, documents.dtype)), inputs)
    return jnp.moveaxis(h, 0, 2), tuple(state)


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(args, g, implementation):
    """Of every float, from those of outputs and state."""
    *floats, documents, state = args

    def run(floats, state):
        if implementation is None:
            return scan(floats, documents, state)
        return mlstm_chunk(*floats, documents, state, chunk=64, implementation=implementation)

    return jax.tree.leaves(jax.vjp(run, floats, state)[1](g))


def cotangents(args, of_state=True):
    """Random gradients of outputs, less where denominators are small, which magnify errors; and of the state."""
    _, below, _ = recurrence(*args)
    h, state = forward(*args)
    g = jax.random.normal(jax.random.key(1), h.shape) * jnp.asarray(np.minimum(below, 1.0) ** 2, jnp.float32)
    key = jax.random.key(2)
    return g, jax.tree.map(lambda a: jax.random.normal(key, a.shape) if of_state else jnp.zeros_like(a), state)


def same_gradients(got, want, tolerance):
    for n, (have, wanted) in enumerate(zip(got, want)):
        have = np.asarray(have.astype(jnp.float32))
        np.testing.assert_allclose(have, wanted, atol=tolerance * float(jnp.abs(wanted).max()), err_msg=str(n))


# One position; documents that begin nowhere, inside of blocks, at their borders and next to them; large heads.
SHAPES = [
    (1, 8, 16, ()),
    (300, 8, 16, ()),
    (300, 8, 16, (5, 70, 200)),
    (300, 8, 16, (128, 256)),
    (300, 8, 16, (1, 127, 129, 255, 299)),
    (130, 128, 256, None),
]


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype, tolerance, implementation):
    args = case(*shape[:3], dtype, shape[3])
    g = cotangents(args)
    got = gradients(args, g, implementation)
    assert [a.dtype for a in got] == [a.dtype for a in (*args[:5], *args[6])]
    same_gradients(got, gradients(args, g, None), tolerance)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_gradients_without_those_of_the_state(implementation):
    args = case(300)
    g = cotangents(args, of_state=False)
    same_gradients(gradients(args, g, implementation), gradients(args, g, None), 1e-4)


def test_gradients_go_in_equal_parts_where_exponents_are_equal():
    """As in the reference, where a maximum is taken twice."""
    *qkv, gate, forget, documents, state = case(150)
    args = (*qkv, jnp.zeros_like(gate), jnp.zeros_like(forget), documents, state)
    g = cotangents(args)
    same_gradients(gradients(args, g, "interpret"), gradients(args, g, "reference"), 5e-5)


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
    g = cotangents(args)
    same_gradients(run(capfd, lambda *a: gradients(*a, "tpu"), args, g), gradients(args, g, None), 1e-4)


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
