"""Smoothing against the recurrence, and H-Net's chunk, smoothing and unchunk together against published numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.mixing import ema
from atom_jax.chunking.pooling import POOLS
from atom_jax.chunking.segments import gather
from atom_jax.chunking.types import START, Boundary, PlanState
from atom_jax.chunking.upsampling import UPSAMPLERS
from tests.chunking.layouts import make_plan, tokens


@pytest.mark.parametrize("m", [1, 9])
def test_recurrence(m):
    keys = jax.random.split(jax.random.key(0), 3)
    v, z = jax.random.normal(keys[0], (3, m, 4)), jax.random.normal(keys[1], (3, 4))
    p = jax.random.uniform(keys[2], (3, m)).at[0, 0].set(1.0)
    segments = jnp.asarray([[1] * 9, [1, 1, 1, 2, 2, 3, 3, 0, 0], [0] * 9], jnp.int32)[:, :m]
    got = jax.jit(ema)(v, p, segments > 0, segments, z)
    assert got.dtype == jnp.float32
    v, p, z = (np.asarray(x) for x in (v, np.clip(p, 1e-4, 1 - 1e-4), z))
    for b in range(3):
        now = z[b]
        for j in range(m):
            if segments[b, j]:
                old = np.zeros(4) if j and segments[b, j] != segments[b, j - 1] else now
                now = p[b, j] * v[b, j] + (1 - p[b, j]) * old
            np.testing.assert_allclose(got[b, j], now, atol=1e-6)


@pytest.fixture(scope="module")
def published(golden):
    return jax.tree.map(jnp.asarray, load_file(golden / "hnet" / "modules.safetensors"))


def cosine_router(h, wq, wk, where):
    """Probability of a boundary: dissimilarity of neighbours; 1 where a document begins."""
    q, k = jnp.roll(h, 1, axis=1) @ wq.T, h @ wk.T
    size = jnp.maximum(jnp.linalg.norm(q, axis=-1), 1e-12) * jnp.maximum(jnp.linalg.norm(k, axis=-1), 1e-12)
    p = jnp.clip((1 - jnp.sum(q * k, axis=-1) / size) / 2, 0.0, 1.0)
    return jnp.where(where.positions == 0, 1.0, p)


@functools.partial(jax.jit, static_argnames=("m", "official"))
def level(h, wq, wk, w, where, m, official=False):
    """One stage of H-Net around tanh(u w)."""
    cfg, b, d = Chunking(), *h.shape[::2]
    p = cosine_router(h, wq, wk, where)
    boundary = Boundary(mark=(p > 0.5) & (where.segments > 0), p=p, kind=START)
    plan, _ = make_plan(boundary, where, m, PlanState.empty(b), official=official)
    u, _ = POOLS["first"].apply({}, h, boundary, plan, (), cfg=cfg)
    real = plan.tokens.segments > 0
    z = ema(jnp.tanh(u[:, :, 0] @ w), gather(p, plan.at), real, plan.tokens.segments, jnp.zeros((b, d)))
    y = UPSAMPLERS["repeat"].apply({}, z[:, :, None], h, plan, jnp.zeros((b, 1, d)), cfg=cfg)
    return y, (boundary, plan, u)


NAMES = ("hidden", "q_proj", "k_proj", "main_w")


def test_hnet_padded(published):
    x = published
    where = tokens([45], [42], [32], t=45)

    def loss(h, wq, wk):
        y, more = level(h, wq, wk, x["main_w"], where, m=25)
        return jnp.sum(jnp.where(x["mask"][..., None], y, 0.0) ** 2), (y, more)

    inputs = [x[n] for n in NAMES[:3]]
    grads, (y, (boundary, plan, u)) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    np.testing.assert_array_equal(boundary.mark, x["boundary_mask"])
    np.testing.assert_array_equal(plan.tokens.segments > 0, x["pooled_mask"])
    np.testing.assert_array_equal(u[:, :, 0], jnp.where(x["pooled_mask"][..., None], x["pooled"], 0.0))
    np.testing.assert_allclose(y[x["mask"]], x["dechunked"][x["mask"]], atol=1e-6)
    for got, name in zip(grads, ("grad_hidden", "grad_q_proj", "grad_k_proj")):
        np.testing.assert_allclose(got, x[name], atol=1e-6 * float(jnp.abs(x[name]).max()))


def test_hnet_unused_slots_as_published(published):
    x = published
    _, (_, _, u) = level(*(x[n] for n in NAMES), tokens([45], [42], [32], t=45), m=25, official=True)
    np.testing.assert_array_equal(u[:, :, 0], x["pooled"])


def test_hnet_packed(published):
    x = published
    lengths = np.diff(x["packed_cu_seqlens"]).tolist()
    mask = np.asarray(x["mask"])
    h = x["hidden"][mask][None]
    y, (boundary, plan, _) = level(h, *(x[n] for n in NAMES[1:]), tokens(lengths, t=119), m=64)
    np.testing.assert_array_equal(boundary.mark[0], x["packed_boundary_mask"])
    np.testing.assert_allclose(y[0], x["packed_dechunked"], atol=1e-6)
    counts = np.bincount(np.asarray(plan.tokens.segments[0]))[1:]
    np.testing.assert_array_equal(np.cumsum([0, *counts]), x["packed_next_cu_seqlens"])
    chex.assert_shape(y, (1, 119, 64))
