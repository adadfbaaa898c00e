"""Models' parts with the kernels' programs (in interpret mode) against the same parts without, and their programs for
many TPUs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from atom_jax import sharding
from atom_jax.chunking import mixing, segments
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.pooling import POOLS
from atom_jax.chunking.upsampling import UPSAMPLERS
from atom_jax.kvcache import pool as pool_lib
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Call
from atom_jax.nn.attention import Tokens
from atom_jax.nn.ssd import Mamba2Config, MambaState, mamba2, mamba2_spec
from atom_jax.params import init
from pallas_kernels import dispatch
from tests.chunking.layouts import plan_of, random_marks, tokens

WHERE = tokens([7, 5], [12], [1], t=12)
D = 6


def both(monkeypatch, function, *args):
    """The result with kernels and without; the function is traced anew for each."""
    with_kernels = {}
    for name in ("reference", "interpret"):
        monkeypatch.setattr(dispatch, "DEFAULT", name)
        with_kernels[name] = jax.jit(lambda *a: function(*a))(*args)
    monkeypatch.setattr(dispatch, "DEFAULT", None)
    return with_kernels["interpret"], with_kernels["reference"]


def with_gradient(function):
    """Outputs and the gradient of a weighted sum of them."""

    def run(x, *rest):
        out, back = jax.vjp(lambda x: function(x, *rest), x)
        return out, back(jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), out))

    return run


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_pools(pool, monkeypatch):
    cfg = Chunking(slots=2, heads=2)
    boundary, plan = plan_of(random_marks(0, "end", WHERE), WHERE, m=5)
    boundary = dataclasses.replace(boundary, hard=boundary.mark.astype(jnp.float32))
    p = init(jax.random.key(1), POOLS[pool].spec(cfg, D))
    state = POOLS[pool].init_state(cfg, D, 3, jnp.float32)
    h = jax.random.normal(jax.random.key(2), (3, 12, D))
    apply = with_gradient(lambda h: POOLS[pool].apply(p, h, boundary, plan, state, cfg=cfg)[0])
    chex.assert_trees_all_close(*both(monkeypatch, apply, h), atol=2e-5)


@pytest.mark.parametrize("upsampler", ["repeat", "cross_attention"])
def test_upsamplers(upsampler, monkeypatch):
    cfg = Chunking(heads=2)
    _, plan = plan_of(random_marks(0, "end", WHERE), WHERE, m=5)
    p = init(jax.random.key(1), UPSAMPLERS[upsampler].spec(cfg, D))
    h, v, z = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((3, 12, D), (3, 5, 1, D), (3, 1, D))))
    apply = with_gradient(lambda v: UPSAMPLERS[upsampler].apply(p, v, h, plan, z, cfg=cfg))
    chex.assert_trees_all_close(*both(monkeypatch, apply, v), atol=2e-5)


def test_smoothing(monkeypatch):
    v, p, z = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((2, 9, D), (2, 9), (2, D))))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 0, 0], [1] * 9], jnp.int32)
    apply = with_gradient(lambda v: mixing.ema(v, jax.nn.sigmoid(p), ids > 0, ids, z))
    chex.assert_trees_all_close(*both(monkeypatch, apply, v), atol=2e-6)


def test_mamba(monkeypatch):
    cfg = Mamba2Config(d_state=8, head_dim=4, chunk=4)
    p = init(jax.random.key(0), mamba2_spec(D, cfg))
    x = jax.random.normal(jax.random.key(1), (3, 12, D))
    state = MambaState.empty(3, D, cfg, jnp.float32)
    apply = with_gradient(lambda x: mamba2(p, x, WHERE, state, cfg)[0])
    chex.assert_trees_all_close(*both(monkeypatch, apply, x), atol=2e-6)


def test_pages_of_the_dms_cache(monkeypatch):
    """Rows of many lengths, filled token by token, so that their pages lie in no order."""
    b, h, g, k = 2, 2, 3, 16
    pool = pool_lib.Pool.empty(b, h, 8, 8, k, jnp.float32)
    put = jax.jit(pool_lib.Pool.put)
    for i in range(13):
        keys = jax.random.split(jax.random.key(i), 2)
        live = jnp.asarray([[True, i % 2 == 0], [i < 3, False]])
        new = (jax.random.normal(key, (b, h, k)) for key in keys)
        pool, _ = put(pool, *new, jnp.full((b, h), -1, jnp.int32), live)
    q = jax.random.normal(jax.random.key(99), (b, h, g, k))
    monkeypatch.setattr(dispatch, "DEFAULT", "interpret")
    assert pool.by_kernel
    got = jax.jit(pool_lib.Pool.attend_pages)(pool, q)
    chex.assert_trees_all_close(got, pool.attend_one(q)[0], atol=2e-6)


def test_dense_cache(monkeypatch):
    b, h, g, k = 2, 2, 3, 16
    layer = DenseLayer(*(jax.random.normal(jax.random.key(i), (b, h, 48, k)) for i in range(2)))
    keys = jax.random.split(jax.random.key(2), 3)
    q = jax.random.normal(keys[0], (b, h, g, 1, k))
    new = [jax.random.normal(key, (b, h, 1, k)) for key in keys[1:]]
    length = jnp.asarray([3, 40], jnp.int32)
    where = Tokens(length[:, None], jnp.ones((b, 1), jnp.int32))
    step = functools.partial(lambda layer, q, k, v: layer.extend(Call(q, k, v, where, length))[0])
    chex.assert_trees_all_close(*both(monkeypatch, step, layer, q, *new), atol=2e-6)


MESH = AbstractMesh(
    (2, 2, 1, 2),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * 4,
    abstract_device=AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
)


def test_programs_for_many_tpus():
    """A kernel that is not told which rows a device has cannot be lowered for several."""
    cfg = Mamba2Config(d_state=128, head_dim=64)
    p = init(jax.random.key(0), mamba2_spec(64, cfg))

    def loss(x, ids):
        where = Tokens(jnp.zeros(ids.shape, jnp.int32) + jnp.arange(ids.shape[1])[None], ids + 1)
        u = segments.segment_max(segments.segment_sum(x, ids, 8), ids[:, :8], 8)
        v = segments.linear_scan(jnp.ones((*u.shape[:2], 1)), jnp.where(jnp.isfinite(u), u, 0.0))
        y = segments.read_chunks(v, v[:, 0], ids)
        return jnp.sum(mamba2(p, y, where, None, cfg)[0])

    shapes = [jax.ShapeDtypeStruct((8, 16, 64), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.int32)]
    with jax.sharding.use_abstract_mesh(MESH):
        text = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 5
