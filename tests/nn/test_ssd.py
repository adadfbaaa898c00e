"""Mamba-2 against the official numbers, against a loop in numpy, and under every way to cut up and pad a text."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.nn.attention import Tokens
from atom_jax.nn.ssd import Mamba2Config, MambaState, mamba2, mamba2_spec
from atom_jax.typing import AtomError

D = 16
CFG = Mamba2Config(d_state=8, d_conv=4, expand=2, head_dim=8, chunk=8)
run = jax.jit(mamba2, static_argnums=4)


def tokens_of(lengths, left=0, right=0):
    """Packed documents of the given lengths, the same in two rows, between paddings."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments, positions = (np.pad(x, (left, right)).astype(np.int32) for x in (segments, positions))
    return Tokens(*(jnp.broadcast_to(jnp.asarray(x)[None], (2, len(x))) for x in (positions, segments)))


def cut(x, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], x)


@functools.cache
def weights():
    p = params.init(jax.random.key(0), mamba2_spec(D, CFG))
    # Larger than at the start of training, so that every part matters in the output.
    p["in_proj"] = p["in_proj"] * 20
    p["out_proj"] = p["out_proj"] * 20
    p["dt_bias"] = p["dt_bias"] + 3.0
    return p


def inputs(t):
    return jax.random.normal(jax.random.key(7), (2, t, D))


def empty():
    return MambaState.empty(2, D, CFG, jnp.float32)


def by_hand(p, x_btd, tokens):
    """The recurrence as the paper writes it, float64, one document at a time."""
    p = {name: np.asarray(a, np.float64) for name, a in p.items()}
    x_btd, segments = np.asarray(x_btd, np.float64), np.asarray(tokens.segments)
    e, h, c = CFG.sizes(D)
    out = np.zeros_like(x_btd)
    for row in range(2):
        for document in np.unique(segments[row][segments[row] > 0]):
            at = np.flatnonzero(segments[row] == document)
            z, xbc, dt = np.split(x_btd[row, at] @ p["in_proj"], [e, e + c], axis=1)
            before = np.pad(xbc, ((3, 0), (0, 0)))
            conv = p["conv_b"] + sum(before[i : i + len(at)] * p["conv_w"][:, i] for i in range(4))
            x, b, cc = np.split(conv / (1 + np.exp(-conv)), [e, e + CFG.d_state], axis=1)
            dt = np.log1p(np.exp(dt + p["dt_bias"]))
            s = np.zeros((h, CFG.head_dim, CFG.d_state))
            y = np.zeros((len(at), h, CFG.head_dim))
            for t in range(len(at)):
                x_t = x[t].reshape(h, -1)
                s = s * np.exp(-dt[t] * np.exp(p["A_log"]))[:, None, None]
                s = s + (dt[t][:, None] * x_t)[:, :, None] * b[t]
                y[t] = s @ cc[t] + p["D"][:, None] * x_t
            y = y.reshape(len(at), e) * z / (1 + np.exp(-z))
            y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + 1e-5) * p["norm"]
            out[row, at] = y @ p["out_proj"]
    return out


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "hnet" / "mamba2.safetensors")


@pytest.mark.parametrize("chunk", [7, 256])
def test_equals_the_official_layer(official, chunk):
    w = {name[2:]: jnp.asarray(a) for name, a in official.items() if name.startswith("w.")}
    p = {"in_proj": w["in_proj.weight"].T, "conv_w": w["conv1d.weight"][:, 0], "conv_b": w["conv1d.bias"]}
    p |= {"dt_bias": w["dt_bias"], "A_log": w["A_log"], "D": w["D"], "norm": w["norm.weight"]}
    p["out_proj"] = w["out_proj.weight"].T
    cfg = Mamba2Config(d_state=16, chunk=chunk)
    u = jnp.asarray(official["u"])
    assert jax.tree.map(jnp.shape, p) == jax.tree.map(jnp.shape, params.abstract(mamba2_spec(64, cfg)))
    y, state = run(p, u, tokens_of([19]), MambaState.empty(2, 64, cfg, jnp.float32), cfg)
    np.testing.assert_allclose(y, official["y"], atol=2e-6)
    np.testing.assert_allclose(state.s, official["ssm_state"], atol=2e-6)
    np.testing.assert_allclose(state.conv.transpose(0, 2, 1), official["conv_state"][:, :, 1:], atol=2e-6)
    segments = jnp.asarray(official["seq_idx"], jnp.int32) + 1
    # Positions that never restart: the change of segment is enough.
    packed = Tokens(tokens_of([19]).positions, segments)
    np.testing.assert_allclose(run(p, u, packed, None, cfg)[0], official["y_seq_idx"], atol=2e-6)


@pytest.mark.parametrize("lengths", [[21], [1, 2, 11, 7]])
def test_equals_a_loop(lengths):
    x, tokens = inputs(21), tokens_of(lengths)
    np.testing.assert_allclose(run(weights(), x, tokens, None, CFG)[0], by_hand(weights(), x, tokens), atol=2e-5)


def test_position_zero_begins_a_document_of_the_same_segment():
    x, tokens = inputs(21), tokens_of([9, 12])
    same = Tokens(tokens.positions, jnp.ones_like(tokens.segments))
    chex.assert_trees_all_equal(run(weights(), x, same, None, CFG), run(weights(), x, tokens, None, CFG))


def test_block_size_changes_neither_values_nor_gradients():
    x, tokens = inputs(21), tokens_of([5, 14], right=2)
    real = (tokens.segments > 0)[..., None]

    def loss(chunk):
        cfg = Mamba2Config(d_state=8, head_dim=8, chunk=chunk)

        def f(p, x):
            y, _ = mamba2(p, x, tokens, None, cfg)
            return jnp.sum(jnp.where(real, jnp.sin(y), 0.0))

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(weights(), x)

    whole = loss(21)
    chex.assert_tree_all_finite(whole)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(whole[1]))
    for chunk in (7, 8):
        chex.assert_trees_all_close(loss(chunk), whole, atol=3e-4, rtol=3e-5)


@pytest.mark.parametrize("lengths", [[21], [7, 14]])
@pytest.mark.parametrize("sizes", [[1] * 21, [8, 1, 5, 7]])
def test_in_pieces_equals_whole(sizes, lengths):
    x, tokens = inputs(21), tokens_of(lengths)
    whole, end = run(weights(), x, tokens, empty(), CFG)
    state, parts, start = empty(), [], 0
    for n in sizes:
        y, state = run(weights(), *cut((x, tokens), start, start + n), state, CFG)
        parts.append(y)
        start += n
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    chex.assert_trees_all_close(state, end, atol=2e-5)


@pytest.mark.parametrize("n", [1, 6])
def test_a_new_document_forgets_the_state(n):
    x, tokens = inputs(12), tokens_of([12])
    _, used = run(weights(), x, tokens, empty(), CFG)
    fresh = run(weights(), *cut((x, tokens), 0, n), empty(), CFG)
    chex.assert_trees_all_close(run(weights(), *cut((x, tokens), 0, n), used, CFG), fresh, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_padding_changes_nothing(n):
    x = inputs(n)
    y, state = run(weights(), x, tokens_of([n]), empty(), CFG)
    for left, right in ((0, 5), (5, 0)):
        padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)), constant_values=3.0)
        y_padded, same = run(weights(), padded, tokens_of([n], left, right), empty(), CFG)
        np.testing.assert_allclose(y_padded[:, left : left + n], y, atol=1e-5)
        chex.assert_trees_all_close(same, state, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_row_of_padding_keeps_its_state(n):
    x, tokens = inputs(12 + n), tokens_of([12 + n])
    _, state = run(weights(), *cut((x, tokens), 0, 12), empty(), CFG)
    new, after = cut((x, tokens), 12, 12 + n)
    _, expected = run(weights(), new, after, state, CFG)
    _, got = run(weights(), new, after.replace(segments=after.segments.at[1].set(0)), state, CFG)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], got), jax.tree.map(lambda a: a[0], expected), atol=1e-6)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1], got), jax.tree.map(lambda a: a[1], state))


def test_extreme_decays_stay_finite():
    p = {**weights(), "dt_bias": jnp.full(4, 60.0), "A_log": jnp.full(4, 6.0)}
    x, tokens = inputs(40), tokens_of([17, 23])

    def loss(p, x):
        return jnp.sum(jnp.sin(mamba2(p, x, tokens, None, CFG)[0]))

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(p, x))
    np.testing.assert_allclose(run(p, x, tokens, None, CFG)[0], by_hand(p, x, tokens), atol=1e-4)


def test_bfloat16_keeps_a_float32_state():
    p = params.cast(weights(), jnp.bfloat16) | {k: weights()[k] for k in ("dt_bias", "A_log", "D")}
    x, tokens = inputs(21), tokens_of([21])
    y, state = run(p, x.astype(jnp.bfloat16), tokens, MambaState.empty(2, D, CFG, jnp.bfloat16), CFG)
    assert (y.dtype, state.conv.dtype, state.s.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = run(weights(), x, tokens, None, CFG)[0]
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 0.03 * jnp.linalg.norm(exact)
    _, after = run(p, *cut((x.astype(jnp.bfloat16), tokens), 20, 21), state, CFG)
    assert after.s.dtype == jnp.float32


def test_memory_grows_linearly_with_length():
    cfg = Mamba2Config(d_state=8, head_dim=8, chunk=64)
    t = 8192
    p = params.abstract(mamba2_spec(D, cfg))
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((1, t), jnp.int32), Tokens(0, 0))
    grad = jax.grad(lambda p, x, tokens: mamba2(p, x, tokens, None, cfg)[0].sum())
    compiled = jax.jit(grad).lower(p, jax.ShapeDtypeStruct((1, t, D), jnp.float32), tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < t * t


def test_initial_values_are_the_published_ones():
    cfg = Mamba2Config()
    spec = mamba2_spec(1024, cfg, out_scale=0.5)
    assert {name: s.shape for name, s in spec.items()} == {
        "in_proj": (1024, 4384), "conv_w": (2304, 4), "conv_b": (2304,), "dt_bias": (32,), "A_log": (32,),
        "D": (32,), "norm": (2048,), "out_proj": (2048, 1024),
    }  # fmt: skip
    small = params.init(jax.random.key(1), {k: s for k, s in spec.items() if k not in ("in_proj", "out_proj")})
    dt, a = jax.nn.softplus(small["dt_bias"]), jnp.exp(small["A_log"])
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and a.min() >= 1 and a.max() <= 16
    assert 0.45 < jnp.abs(small["conv_w"]).max() <= 0.5


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(AtomError, match="head_dim 64 does not divide the inner width 40"):
        mamba2_spec(20, Mamba2Config())
    with pytest.raises(AtomError, match="chunk: expected a whole number from 1 to 1048576, got 0"):
        Mamba2Config(chunk=0)
