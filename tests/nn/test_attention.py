"""The direct form against a per-query loop in numpy, the blockwise form against the direct one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import blockwise as blocks
from atom_jax.nn.attention import Tokens, attend
from atom_jax.nn.blockwise import blockwise, blockwise_lse
from atom_jax.sharding import MeshConfig, make_mesh

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
@pytest.mark.parametrize(("aligned", "block"), [(False, 8), (True, 8), (True, 4)])
def test_blockwise_equals_direct_in_values_and_gradients(packed, window, aligned, block):
    q, k, v, tokens = inputs(packed)
    weight = jax.random.normal(jax.random.key(5), q.shape) * (tokens.segments > 0)[:, None, None, :, None]
    places = (tokens.positions, tokens.segments) * 2

    def loss(form):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(form(*x) * weight), argnums=(0, 1, 2)))(q, k, v)

    direct = loss(lambda q, k, v: attend(q, k, v, tokens, tokens, window=window, aligned=aligned))
    tiles = loss(lambda q, k, v: blockwise(q, k, v, places, window, aligned, block))
    chex.assert_trees_all_close(tiles, direct, atol=2e-5)


@pytest.mark.parametrize("start", [0, 24])
@pytest.mark.parametrize("window", [None, 13])
def test_tiles_that_nobody_sees_are_left_out(window, start):
    size, rng = 8, np.random.default_rng(3)
    ends = np.sort(rng.choice(np.arange(1, 96), 5, replace=False))
    segments = np.searchsorted(ends, np.arange(96), side="right").astype(np.int32)[None] + 1
    positions = np.arange(96, dtype=np.int32)[None]
    here = slice(start, 96)
    places = (positions[:, here], segments[:, here], positions, segments)
    q_pos, q_seg, k_pos, k_seg = (x[0] for x in places)
    gap = q_pos[:, None] - k_pos
    seen = (q_seg[:, None] == k_seg) & (gap >= 0) & (gap < (window or 97))
    tiles = seen.reshape(-1, size, 12, size).any((1, 3))
    spans = blocks._spans(tuple(map(jnp.asarray, places)), jnp.int32(start), window, True, (size, size))
    i = np.arange(12)
    for (first, last), some in ((spans.keys, tiles), (spans.queries, tiles.T)):
        computed = (i[: some.shape[1]] >= np.asarray(first)[:, None]) & (
            i[: some.shape[1]] < np.asarray(last)[:, None]
        )
        assert (computed >= some).all() and computed.sum() <= 1.2 * some.sum() < 0.5 * some.size


def test_few_queries_make_lower_tiles():
    q, k, v, tokens = inputs(True)
    last = slice(T - 9, T - 4)
    few = Tokens(tokens.positions[:, last], tokens.segments[:, last])
    places = (few.positions, few.segments, tokens.positions, tokens.segments)

    def loss(form):
        out, back = jax.vjp(jax.jit(form), q[..., last, :], k, v)
        return out, back(jnp.cos(out))

    def tiles(q, k, v):
        return blockwise(q, k, v, places, 21, False, 16)

    chex.assert_trees_all_close(loss(tiles), loss(lambda q, k, v: attend(q, k, v, few, tokens, window=21)), atol=2e-5)
    shapes = str(jax.make_jaxpr(tiles)(q[..., last, :], k, v))
    assert "2,2,3,8,16]" in shapes and "16,16]" not in shapes


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


def kernel_inputs():
    q, k, v, tokens = inputs(True)
    keep = -4 * jax.random.uniform(jax.random.key(9), k.shape[:3])
    return (q, k, v, keep), (tokens.positions, tokens.segments) * 2


def test_kernel_equals_blocks_in_values_and_gradients():
    """What runs on TPU (its program, interpreted) and what runs elsewhere; padding aside."""
    arrays, places = kernel_inputs()
    real = places[1] > 0
    weight = jax.random.normal(jax.random.key(5), arrays[0].shape) * real[:, None, None, :, None]

    def both(implementation):
        def loss(q, k, v, keep):
            return jnp.sum(blockwise(q, k, v, places, 21, True, 8, keep, 4, implementation=implementation) * weight)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    chex.assert_trees_all_close(both("interpret"), both("reference"), atol=2e-5)
    run = jax.jit(blockwise_lse, static_argnums=(4, 5, 6, 8, 9))
    got, expected = (run(*arrays[:3], places, 21, True, 8, arrays[3], 4, x)[1] for x in ("interpret", "reference"))
    real = np.broadcast_to(np.asarray(real)[:, None, None], got.shape)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=2e-5)


def test_kernel_runs_where_rows_and_heads_are():
    """Over a mesh of two by two devices, without gathering what they hold."""
    arrays, places = kernel_inputs()
    expected = blockwise(*arrays[:3], places, None, True, 8, arrays[3], 4)

    def run(q, k, v, keep, places):
        return blockwise(q, k, v, places, None, True, 8, keep, 4, implementation="interpret")

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
        compiled = jax.jit(run).lower(*arrays, places).compile()
        got = compiled(*arrays, places)
    real = np.asarray(places[1] > 0)[:, None, None, :, None]
    np.testing.assert_allclose(got * real, expected * real, atol=2e-6)
    assert got.sharding.spec[:2] == ("data", "tensor")


def test_kernel_is_chosen_for_tpu():
    """Lowering for eight chips, from a machine without them, puts the kernel into a shard_map."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=types, abstract_device=device)
    q = jax.ShapeDtypeStruct((4, 2, 4, 1024, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 2, 1024, 128), jnp.bfloat16)
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((4, 1024), jnp.int32), Tokens(0, 0))

    def loss(q, k, v, tokens):
        return attend(q, k, v, tokens, tokens, aligned=True).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "tensor<1x1x4x1024x128xbf16>" in text
