"""Upsamplers against published numbers and loops over positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.pooling import POOLS
from atom_jax.chunking.segments import read_chunks
from atom_jax.chunking.types import END, START
from atom_jax.chunking.upsampling import UPSAMPLERS, carry
from atom_jax.typing import AtomError
from tests.chunking.layouts import plan_of, random_marks, tokens

T, M, D = 14, 6, 8


@pytest.fixture(scope="module")
def rows():
    where = tokens([14], [5, 9], [3, 4, 2], [1, 13], t=T)
    _, plan = plan_of(random_marks(5, END, where, rate=0.5), where, m=M)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((4, M, 2, D), (4, T, D), (4, 2, D))
    return plan, *(jax.random.normal(k, s) for k, s in zip(keys, shapes))


def test_dynamic_pooling_numbers(golden):
    x = load_file(golden / "dynpool" / "dynpool.safetensors")
    h, mark = jnp.asarray(x["gumbel.hidden_pre"]).swapaxes(0, 1), jnp.asarray(x["gumbel.hard"]) > 0
    null = jnp.broadcast_to(x["w.null_group"], (2, 1, 32))

    @jax.jit
    def through(boundary, plan):
        u, _ = POOLS["mean"].apply({}, h, boundary, plan, jnp.zeros((2, 32)), cfg=Chunking())
        return carry(u, plan, null), UPSAMPLERS["repeat"].apply({}, u, h, plan, null, cfg=Chunking())

    for marks, name in [(mark, "gumbel"), (jnp.zeros_like(mark), "edge")]:
        boundary, plan = plan_of(marks, tokens([39], [39], t=39))
        last, y = through(boundary, plan)
        np.testing.assert_allclose(last[:, 0], x[f"{name}.up"][-1], atol=1e-6)
        np.testing.assert_allclose(y.swapaxes(0, 1), x[f"{name}.up"], atol=1e-6)


@pytest.mark.parametrize("kind", [START, END])
def test_gradient_of_reading(kind):
    """The sum over runs equals the gradient of plain indexing, in packed rows whose reads fall back to -1."""
    where = tokens([14], [5, 9], [3, 4, 2], [2] * 7, t=T)
    mark = random_marks(5, kind, where, rate=0.5, forced=False)
    _, plan = plan_of(mark, where, kind, m=M)
    assert np.asarray((plan.read[:, 1:] < plan.read[:, :-1]) & (where.segments[:, 1:] > 0)).any()
    keys = jax.random.split(jax.random.key(0), 3)
    v, z, g = (jax.random.normal(k, s) for k, s in zip(keys, ((4, M, D), (4, D), (4, T, D))))
    table = jnp.arange(4)[:, None]

    def mine(v, z):
        return read_chunks(v, z, plan.read)

    def plain(v, z):
        return jnp.concatenate([z[:, None], v], axis=1)[table, plan.read + 1]

    @jax.jit
    def both(v, z):
        return [(y, back(g)) for y, back in (jax.vjp(f, v, z) for f in (plain, mine))]

    want, got = both(v, z)
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_cross_attention(rows):
    plan, v, h, z = rows
    cfg = Chunking(heads=2, slots=2)
    p = params.init(jax.random.key(3), UPSAMPLERS["cross_attention"].spec(cfg, D))
    p = {**p, "q_norm": p["q_norm"] * 1.5, "kv_norm": p["kv_norm"] * jnp.linspace(0.5, 2, D)}
    got = jax.jit(lambda p: UPSAMPLERS["cross_attention"].apply(p, v, h, plan, z, cfg=cfg))(p)
    p = jax.tree.map(np.asarray, p)

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w

    for b in range(4):
        for t in range(T):
            j = int(plan.read[b, t])
            slots = norm(np.asarray(v[b, j] if j >= 0 else z[b]), p["kv_norm"])
            q = np.einsum("d,dnc->nc", norm(np.asarray(h[b, t]), p["q_norm"]), p["q"])
            k, x = (np.einsum("kd,dnc->knc", slots, p[w]) for w in "kv")
            s = np.exp(np.einsum("nc,knc->nk", q, k) / 2)
            out = np.einsum("nk,knc->nc", s / s.sum(-1, keepdims=True), x)
            np.testing.assert_allclose(got[b, t], np.einsum("nc,ncd->d", out, p["o"]), atol=1e-5)


def test_slots(rows):
    plan, v, h, z = rows
    cfg = Chunking(max_positions=2)
    p = params.init(jax.random.key(3), UPSAMPLERS["slots"].spec(cfg, D))
    got = UPSAMPLERS["slots"].apply(p, v[:, :, :1], h, plan, z[:, :1], cfg=cfg)
    for b in range(4):
        for t in range(T):
            j, place = int(plan.read[b, t]), min(int(plan.offset[b, t]), 1)
            x = v[b, j, 0] if j >= 0 else z[b, 0]
            np.testing.assert_allclose(got[b, t], x @ p["w"][:, place], atol=1e-6)


def test_one_vector_per_chunk(rows):
    plan, v, h, z = rows
    for name in ("repeat", "slots"):
        p = params.init(jax.random.key(3), UPSAMPLERS[name].spec(Chunking(), D))
        with pytest.raises(AtomError, match=f"'{name}'.*slots is 2"):
            UPSAMPLERS[name].apply(p, v, h, plan, z, cfg=Chunking())
