"""The direct form against a per-query loop in numpy, the blockwise form against the direct one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn.attention import Tokens, attend
from atom_jax.nn.blockwise import blockwise

B, H, G, T, K = 2, 2, 3, 45, 8


def inputs(packed: bool):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, H, G, T, K))
    k, v = (jax.random.normal(x, (B, H, T, K)) for x in keys[1:])
    lengths = [[20, 17, 8], [5, 30, 10]] if packed else [[T], [T]]
    segments = np.array([np.repeat(np.arange(1, len(x) + 1), x) for x in lengths], np.int32)
    if packed:
        segments[:, -4:] = 0
    positions = np.array([np.concatenate([np.arange(n) for n in x]) for x in lengths], np.int32)
    return q, k, v, Tokens(jnp.asarray(positions), jnp.asarray(segments))


def by_hand(q, k, v, tokens, window):
    q, k, v = map(np.asarray, (q, k, v))
    positions, segments = np.asarray(tokens.positions), np.asarray(tokens.segments)
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            gap = positions[b, t] - positions[b]
            seen = (segments[b] == segments[b, t]) & (gap >= 0) & (gap < (window or T + 1))
            for h in range(H):
                s = q[b, h, :, t] @ k[b, h, seen].T / np.sqrt(K)
                w = np.exp(s - s.max(-1, keepdims=True))
                out[b, h, :, t] = w / w.sum(-1, keepdims=True) @ v[b, h, seen]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_direct_equals_a_loop(packed, window):
    q, k, v, tokens = inputs(packed)
    out = attend(q, k, v, tokens, tokens, window=window, aligned=True)
    np.testing.assert_allclose(out, by_hand(q, k, v, tokens, window), atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 6, 21])
@pytest.mark.parametrize("aligned", [False, True])
def test_blockwise_equals_direct_in_values_and_gradients(packed, window, aligned):
    q, k, v, tokens = inputs(packed)
    weight = jax.random.normal(jax.random.key(5), q.shape) * (tokens.segments > 0)[:, None, None, :, None]
    places = (tokens.positions, tokens.segments) * 2

    def loss(form):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(form(*x) * weight), argnums=(0, 1, 2)))(q, k, v)

    direct = loss(lambda q, k, v: attend(q, k, v, tokens, tokens, window=window, aligned=aligned))
    blocks = loss(lambda q, k, v: blockwise(q, k, v, places, window, aligned, 8))
    chex.assert_trees_all_close(blocks, direct, atol=2e-5)


def test_blockwise_builds_no_square_array():
    t = 4096
    q = jax.ShapeDtypeStruct((1, 1, 1, t, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 1, t, 8), jnp.float32)
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((1, t), jnp.int32), Tokens(0, 0))

    def loss(q, k, v, tokens):
        return attend(q, k, v, tokens, tokens, aligned=True).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < t * t


def test_the_future_has_no_gradient():
    q, k, v, tokens = inputs(False)
    for form in (
        lambda k, v: attend(q, k, v, tokens, tokens),
        lambda k, v: blockwise(q, k, v, (tokens.positions, tokens.segments) * 2, None, True, 8),
    ):
        d_k, d_v = jax.grad(lambda k, v, form=form: form(k, v)[:, :, :, :20].sum(), argnums=(0, 1))(k, v)
        assert not np.any(d_k[:, :, 20:]) and not np.any(d_v[:, :, 20:])
        assert np.any(d_v[:, :, 19])
