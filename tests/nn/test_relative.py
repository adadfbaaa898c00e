"""Transformer-XL layers against the official numbers, against a dense form, in tiles and in pieces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.nn import relative
from atom_jax.nn.attention import Tokens
from atom_jax.nn.norm import layer_norm
from atom_jax.nn.relative import biases_spec, relative_attention, relative_layer, relative_spec
from atom_jax.typing import AtomError

B, H, D, F = 2, 2, 16, 24
run = jax.jit(relative_layer)


def place(*lengths, left=0, right=0, first=0):
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) + first for n in lengths])
    segments, positions = (np.pad(x, (left, right)).astype(np.int32) for x in (segments, positions))
    return Tokens(*(jnp.broadcast_to(jnp.asarray(x)[None], (B, len(x))) for x in (positions, segments)))


def attention_inputs(t, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v = (jax.random.normal(x, (B, t, H, D // H)) for x in keys[:3])
    r = jax.random.normal(keys[3], (D, H, D // H))
    names = ("r_w_bias", "r_r_bias")
    biases = {n: jax.random.normal(x, (H, D // H)) for n, x in zip(names, jax.random.split(keys[4]))}
    return r, biases, q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def dense(r, biases, q, k, v, tokens):
    """Every score by its own distance, float64."""
    r, q, k, v = (np.asarray(x, np.float64) for x in (r, q, k, v))
    r_w, r_r = (np.asarray(biases[n], np.float64) for n in ("r_w_bias", "r_r_bias"))
    positions, segments = np.asarray(tokens.positions, np.int64), np.asarray(tokens.segments)
    distance = positions[:, :, None] - positions[:, None]
    angle = distance[..., None] / 10000.0 ** (np.arange(0, D, 2) / D)
    projected = np.einsum("btsd,dhk->bhtsk", np.concatenate([np.sin(angle), np.cos(angle)], axis=-1), r)
    scores = np.einsum("bthk,bhsk->bhts", q + r_w, k) + np.einsum("bthk,bhtsk->bhts", q + r_r, projected)
    seen = (distance >= 0) & (segments[:, :, None] == segments[:, None])
    scores = np.where(seen[:, None], scores / np.sqrt(D // H), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bhsk->bthk", weights / weights.sum(-1, keepdims=True), v)


def layer(seed=3):
    p = params.init(jax.random.key(seed), {"layer": relative_spec(D, H, F), "biases": biases_spec(D, H)})
    # Far from the small initial values, so that every part matters.
    p = {k: (10 * v if k.split("/")[-1] not in ("weight", "bias") else v) for k, v in params.flatten(p).items()}
    return params.unflatten(p)


def official_layer(w, name):
    """Our parameters from the published names; matrices there are [outputs, inputs]."""
    w = {
        k.removeprefix(f"w.layers.{name}."): jnp.asarray(v) for k, v in w.items() if k.startswith(f"w.layers.{name}.")
    }
    d, heads = 32, (2, 16)
    return {
        "qkv": w["dec_attn.qkv_net.weight"].T.reshape(d, 3, *heads),
        "qkv_bias": w["dec_attn.qkv_net.bias"].reshape(3, *heads),
        "r": w["dec_attn.r_net.weight"].T.reshape(d, *heads),
        "o": w["dec_attn.o_net.weight"].T.reshape(*heads, d),
        "o_bias": w["dec_attn.o_net.bias"],
        "norm": {n: w[f"dec_attn.layer_norm.{n}"] for n in ("weight", "bias")},
        "up": w["pos_ff.CoreNet.0.weight"].T,
        "up_bias": w["pos_ff.CoreNet.0.bias"],
        "down": w["pos_ff.CoreNet.3.weight"].T,
        "down_bias": w["pos_ff.CoreNet.3.bias"],
        "mlp_norm": {n: w[f"pos_ff.layer_norm.{n}"] for n in ("weight", "bias")},
    }


def test_equals_the_official_layers(golden):
    w = load_file(golden / "dynpool" / "dynpool.safetensors")
    biases = {n: jnp.asarray(w[f"w.{n}"]) for n in ("r_w_bias", "r_r_bias")}

    def rows(name):
        return jnp.asarray(w[name]).transpose(1, 0, 2)

    def through(name, x):
        p = official_layer(w, name)
        assert jax.tree.map(jnp.shape, p) == jax.tree.map(jnp.shape, params.abstract(relative_spec(32, 2, 64)))
        return run(p, biases, x, place(x.shape[1]))[0]

    pre = through("0.0", jnp.asarray(w["w.word_emb.weight"][w["data"].T]))
    np.testing.assert_allclose(pre, rows("gumbel.hidden_pre"), atol=2e-6)
    down = layer_norm(rows("gumbel.down"), jnp.asarray(w["w.down_ln.weight"]), jnp.asarray(w["w.down_ln.bias"]))
    short = through("1.1", through("1.0", down))
    # A position reads the group after as many units as have ended so far, its own included; group 0 is learned.
    ended = np.cumsum(w["gumbel.hard"], axis=1).astype(np.int32)
    up = jnp.take_along_axis(short, jnp.asarray(ended)[..., None], axis=1)
    post = through("2.0", up + pre)
    logits = post @ w["w.final_cast.weight"].T + np.broadcast_to(w["w.final_cast.bias"], (2, 39, 27))
    official = w["gumbel.logits"].reshape(39, 2, 27).transpose(1, 0, 2)
    np.testing.assert_allclose(logits, official, atol=2e-6)


@pytest.mark.parametrize("tokens", [place(13), place(4, 7, right=2), place(5, 6, left=2), place(13, first=6000)])
def test_equals_a_dense_form(tokens):
    x = attention_inputs(13)
    out = jax.jit(relative_attention)(*x, tokens, tokens)
    real = np.asarray(tokens.segments) > 0
    np.testing.assert_allclose(np.asarray(out)[real], dense(*x, tokens)[real], atol=1e-5)


def test_tiles_change_neither_values_nor_gradients(monkeypatch):
    x, tokens = attention_inputs(45), place(20, 22, right=3)
    weight = jax.random.normal(jax.random.key(9), x[2].shape) * (tokens.segments > 0)[..., None, None]

    def loss(block):
        monkeypatch.setattr(relative, "block_size", lambda s: block)

        def form(*x):
            return jnp.sum(relative_attention(*x, tokens, tokens) * weight)

        return jax.jit(jax.value_and_grad(form, argnums=(0, 1, 2, 3, 4)))(*x)

    whole = loss(64)
    chex.assert_tree_all_finite(whole)
    chex.assert_trees_all_close(loss(8), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[6, 1, 4, 1], [1, 11]])
def test_in_pieces_equals_whole(sizes):
    p, x = layer(), jax.random.normal(jax.random.key(1), (B, 12, D))
    whole, _ = run(p["layer"], p["biases"], x, place(12))
    cache = jax.tree.map(lambda a: a + 7.0, DenseLayer.empty(B, H, 16, D // H, jnp.float32))
    taken, out = np.zeros(B, np.int32), np.zeros((B, 12, D), np.float32)
    # The second row lags one position behind: its first call ends in padding (or holds nothing else).
    for call, n in enumerate([*sizes, 1]):
        real = np.minimum([n, n - (call == 0)], 12 - taken)
        index = np.minimum(taken[:, None] + np.arange(n), 11)
        tokens = Tokens(jnp.asarray(index, jnp.int32), jnp.asarray(np.arange(n) < real[:, None], jnp.int32))
        piece = jnp.take_along_axis(x, jnp.asarray(index)[..., None], axis=1)
        y, cache = run(p["layer"], p["biases"], piece, tokens, cache, jnp.asarray(taken))
        for row in range(B):
            out[row, taken[row] : taken[row] + real[row]] = y[row, : real[row]]
        taken = taken + real
    assert taken.tolist() == [12, 12]
    np.testing.assert_allclose(out, whole, atol=1e-5)


def test_memory_grows_linearly_with_length():
    t = 8192
    shapes = params.abstract({"layer": relative_spec(D, H, F), "biases": biases_spec(D, H)})
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((1, t), jnp.int32), Tokens(0, 0))
    grad = jax.grad(lambda p, x, tokens: relative_layer(p["layer"], p["biases"], x, tokens)[0].sum())
    compiled = jax.jit(grad).lower(shapes, jax.ShapeDtypeStruct((1, t, D), jnp.float32), tokens).compile()
    # A [t, t] array of scores would take this much per head.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * t * t


def test_bfloat16_runs():
    p, x = layer(), jax.random.normal(jax.random.key(1), (B, 12, D))
    exact, _ = run(p["layer"], p["biases"], x, place(12))
    y, _ = run(*params.cast((p["layer"], p["biases"], x), jnp.bfloat16), place(12))
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 0.03 * jnp.linalg.norm(exact)


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(AtomError, match="width 16 is not even and a multiple of n_heads 3"):
        relative_spec(16, 3, 8)
