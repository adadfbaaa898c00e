"""mLSTM against the official kernels, against a loop in numpy, and under every way to cut up and pad a text."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.nn import mlstm as module
from atom_jax.nn.attention import Tokens
from atom_jax.nn.mlstm import MLSTMState, mlstm, mlstm_spec, recur
from atom_jax.typing import AtomError
from tests.nn.test_ssd import cut, tokens_of

D, HEADS, CHUNK = 16, 2, 8
run = jax.jit(mlstm, static_argnums=4)
kernel = jax.jit(recur, static_argnums=7)


@functools.cache
def weights():
    p = params.init(jax.random.key(0), mlstm_spec(D, HEADS))
    # Gates that open and close, so that memory, normaliser and scale all matter.
    p["input"] = {"w": p["input"]["w"] * 12, "b": p["input"]["b"] + 10}
    p["forget"] = {"w": p["forget"]["w"] * 12, "b": p["forget"]["b"] + 2}
    return p


def inputs(t):
    return jax.random.normal(jax.random.key(7), (2, t, D))


def empty(b=2, d=D, heads=HEADS):
    return MLSTMState.empty(b, d, heads)


def by_hand(p, x_btd, tokens):
    """The recurrence as the paper writes it, float64, one document at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    x_btd, segments = np.asarray(x_btd, np.float64), np.asarray(tokens.segments)
    out = np.zeros_like(x_btd)
    for row in range(2):
        for document in np.unique(segments[row][segments[row] > 0]):
            c, n, m = np.zeros((HEADS, 4, 8)), np.zeros((HEADS, 4)), np.zeros(HEADS)
            for t in np.flatnonzero(segments[row] == document):
                x = x_btd[row, t]
                q, k, v, o = (np.einsum("d,dhk->hk", x, p[name]) for name in ("q", "k", "v", "gate"))
                i, f = (15 * np.tanh((x @ p[g]["w"] + p[g]["b"]) / 15) for g in ("input", "forget"))
                lf = -np.log1p(np.exp(-f))
                old, m = m, np.maximum(lf + m, i)
                keep, add = np.exp(lf + old - m)[:, None], np.exp(i - m)[:, None]
                n = keep * n + add * k
                c = keep[..., None] * c + (add * k)[..., None] * v[:, None]
                above, below = np.einsum("hk,hkv->hv", q / 2, c), np.einsum("hk,hk->h", q / 2, n)
                h = above / (np.maximum(np.abs(below), np.exp(-m)) + 1e-6)[:, None]
                h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
                h = h.reshape(-1) * p["norm"] / (1 + np.exp(-o.reshape(-1)))
                out[row, t] = h @ p["o"].reshape(D, D)
    return out


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "bolmo" / "mlstm_kernel.safetensors")


def heads_last(x):
    """The official [b, h, t, ...] as [b, t, h, ...]."""
    return jnp.moveaxis(jnp.asarray(x), 1, 2)


def close(found, expected):
    """Relative to the largest value, which is 46 in outputs and 236 in gradients."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_equals_the_official_kernels(official, chunk):
    parts = [heads_last(official[name]) for name in "qkvif"]
    h, state = kernel(*parts, tokens_of([100]), MLSTMState.empty(2, 64, 4), chunk)
    close(h, heads_last(official["h"]))
    for name in "cn":
        close(getattr(state, name), official[name])
    close(state.m, official["m"][..., 0])


def test_prefill_and_steps_equal_the_official_ones(official):
    parts, tokens = [heads_last(official[name]) for name in "qkvif"], tokens_of([100])
    first, rest = cut((parts, tokens), 0, 60), cut((parts, tokens), 60, 100)
    h, state = kernel(*first[0], first[1], MLSTMState.empty(2, 64, 4), 64)
    close(state.c, official["c60"])
    close(state.n, official["n60"])
    close(state.m, official["m60"][..., 0])

    def one(state, t):
        parts, tokens = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, 1), rest)
        h, state = recur(*parts, tokens, state)
        return state, h[:, 0]

    state, steps = jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(40)))(state)
    h = jnp.concatenate([h, jnp.moveaxis(steps, 0, 1)], axis=1)
    close(h, heads_last(official["h_prefill60_then_steps"]))
    close(state.c, official["c_steps"])
    close(state.n, official["n_steps"])
    close(state.m, official["m_steps"][..., 0])


def test_gradients_equal_the_official_ones(official):
    parts = [heads_last(official[f"train_{name}"]) for name in "qkvif"]
    tokens = jax.tree.map(lambda a: a[:1], tokens_of([128]))

    def loss(*parts):
        h, _ = recur(*parts, tokens, MLSTMState.empty(1, 32, 2), 32)
        return jnp.sum(h * heads_last(official["train_w"])), h

    grads, h = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(*parts)
    close(h, heads_last(official["train_h"]))
    for name, grad in zip("qkvif", grads):
        close(grad, heads_last(official[f"train_d{name}"]))


@pytest.mark.parametrize("lengths", [[21], [1, 2, 11, 7]])
def test_equals_a_loop(lengths):
    x, tokens = inputs(21), tokens_of(lengths)
    np.testing.assert_allclose(run(weights(), x, tokens, None, CHUNK)[0], by_hand(weights(), x, tokens), atol=2e-5)


def test_block_size_changes_neither_values_nor_gradients():
    x, tokens = inputs(21), tokens_of([5, 14], right=2)
    real = (tokens.segments > 0)[..., None]

    def loss(chunk):
        def f(p, x):
            y, _ = mlstm(p, x, tokens, None, chunk)
            return jnp.sum(jnp.where(real, jnp.sin(y), 0.0))

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(weights(), x)

    whole = loss(21)
    chex.assert_tree_all_finite(whole)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(whole[1]))
    for chunk in (7, 8):
        chex.assert_trees_all_close(loss(chunk), whole, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("lengths", [[21], [7, 14]])
@pytest.mark.parametrize("sizes", [[1] * 21, [8, 1, 5, 7]])
def test_in_pieces_equals_whole(sizes, lengths):
    x, tokens = inputs(21), tokens_of(lengths)
    whole, end = run(weights(), x, tokens, empty(), CHUNK)
    state, parts, start = empty(), [], 0
    for n in sizes:
        y, state = run(weights(), *cut((x, tokens), start, start + n), state, CHUNK)
        parts.append(y)
        start += n
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    chex.assert_trees_all_close(state, end, atol=2e-5)


@pytest.mark.parametrize("n", [1, 6])
def test_a_new_document_forgets_the_state(n):
    x, tokens = inputs(12), tokens_of([12])
    _, used = run(weights(), x, tokens, empty(), CHUNK)
    fresh = run(weights(), *cut((x, tokens), 0, n), empty(), CHUNK)
    chex.assert_trees_all_close(run(weights(), *cut((x, tokens), 0, n), used, CHUNK), fresh, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_padding_changes_nothing(n):
    x = inputs(n)
    y, state = run(weights(), x, tokens_of([n]), empty(), CHUNK)
    for left, right in ((0, 5), (5, 0)):
        padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)), constant_values=3.0)
        y_padded, same = run(weights(), padded, tokens_of([n], left, right), empty(), CHUNK)
        np.testing.assert_allclose(y_padded[:, left : left + n], y, atol=1e-5)
        chex.assert_trees_all_close(same, state, atol=1e-5)


@pytest.mark.parametrize("n", [1, 9])
def test_a_row_of_padding_keeps_its_state_to_the_bit(n):
    x, tokens = inputs(12 + n), tokens_of([12 + n])
    _, state = run(weights(), *cut((x, tokens), 0, 12), empty(), CHUNK)
    new, after = cut((x, tokens), 12, 12 + n)
    _, got = run(weights(), new, after.replace(segments=after.segments.at[1].set(0)), state, CHUNK)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1], got), jax.tree.map(lambda a: a[1], state))


@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_extreme_gates_stay_finite(bias):
    p = weights() | {g: {"w": weights()[g]["w"], "b": jnp.full(HEADS, bias)} for g in ("input", "forget")}
    x, tokens = inputs(40), tokens_of([17, 23])

    def loss(p, x):
        return jnp.sum(jnp.sin(mlstm(p, x, tokens, None, CHUNK)[0]))

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(p, x))


def test_bfloat16_keeps_a_float32_state():
    p, x, tokens = params.cast(weights(), jnp.bfloat16), inputs(21), tokens_of([21])
    y, state = run(p, x.astype(jnp.bfloat16), tokens, empty(), CHUNK)
    assert (y.dtype, *(a.dtype for a in jax.tree.leaves(state))) == (jnp.bfloat16, *[jnp.float32] * 3)
    exact = run(weights(), x, tokens, None, CHUNK)[0]
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 0.05 * jnp.linalg.norm(exact)


def test_memory_grows_linearly_with_length():
    t = 8192
    p = params.abstract(mlstm_spec(D, HEADS))
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((1, t), jnp.int32), Tokens(0, 0))
    grad = jax.grad(lambda p, x, tokens: mlstm(p, x, tokens, None, 64)[0].sum())
    compiled = jax.jit(grad).lower(p, jax.ShapeDtypeStruct((1, t, D), jnp.float32), tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < t * t


def test_sizes_and_heads_that_do_not_fit():
    shapes = {k: s.shape for k, s in params.flatten(mlstm_spec(2048, 16)).items()}
    assert (shapes["q"], shapes["v"], shapes["o"]) == ((2048, 16, 64), (2048, 16, 128), (16, 128, 2048))
    assert module.sizes(4096, 16) == (128, 256)
    with pytest.raises(AtomError, match="3 mLSTM heads do not divide half the width 16"):
        mlstm_spec(16, 3)
