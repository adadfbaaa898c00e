"""Pools against published numbers, and against a loop over chunks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking import plan as plan_lib
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.pooling import POOLS, check
from atom_jax.chunking.segments import segment_max
from atom_jax.chunking.types import END, START, Boundary, PlanState
from atom_jax.typing import AtomError
from tests.chunking.layouts import plan_of, random_marks, tokens

T, D = 14, 8
CFG = {name: Chunking(pool=name, heads=2, slots=3 if name == "attention" else 1, max_positions=3) for name in POOLS}


@functools.partial(jax.jit, static_argnums=0)
def pool(name, h, boundary, plan, p=None):
    b, _, d = h.shape
    state = POOLS[name].init_state(CFG[name], d, b, h.dtype)
    return POOLS[name].apply(p, h, boundary, plan, state, cfg=CFG[name])


def weights(name):
    """Parameters at random, also those that start at zero or one."""
    p = params.init(jax.random.key(1), POOLS[name].spec(CFG[name], D))
    shift = [jax.random.normal(jax.random.key(i + 2), x.shape) for i, x in enumerate(jax.tree.leaves(p))]
    return jax.tree.unflatten(jax.tree.structure(p), [x + 0.3 * s for x, s in zip(jax.tree.leaves(p), shift)])


def by_hand(name, h_nd, p):
    """The vectors of one chunk, h_nd its positions in order."""
    if name in ("mean", "max", "first", "last"):
        return {"mean": h_nd.mean(0), "max": h_nd.max(0), "first": h_nd[0], "last": h_nd[-1]}[name][None]
    p = jax.tree.map(np.asarray, p)
    if name == "attention":
        x = h_nd / np.sqrt((h_nd**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]
        k, v = (np.einsum("td,dnc->tnc", x, p[w]) for w in "kv")
        s = np.exp(np.einsum("knc,tnc->knt", p["q"], k) / np.sqrt(D // 2))
        found = np.einsum("knt,tnc->knc", s / s.sum(-1, keepdims=True), v)
        return np.einsum("knc,ncd->kd", found, p["o"])

    def norm(x, w):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{w}_norm"] + p[f"{w}_bias"]

    laid = np.zeros((3, D), np.float32)
    laid[: min(len(h_nd), 3)] = h_nd[:3]
    return norm(norm(laid.reshape(-1), "in") @ p["w"] + p["b"], "out")[None]


@pytest.mark.parametrize("name", POOLS)
def test_against_a_loop(name):
    kind, m = (START if name == "first" else END), 6
    where = tokens([14], [5, 9], [3, 4, 2], [], [12], t=T)
    mark = random_marks(5, kind, where, rate=0.5).at[4].set(False)
    h = jax.random.normal(jax.random.key(0), (5, T, D)) * 3
    p = weights(name)
    boundary, plan = plan_of(mark, where, kind, m)
    u, _ = pool(name, h, boundary, plan, p)
    chex.assert_shape(u, (5, m, CFG[name].slots, D))
    for b in range(5):
        for j in range(m):
            inside = np.asarray(plan.member[b] & (plan.slot[b] == j))
            used = j < min(int(plan.count[b]), m)
            assert inside.any() == used
            want = by_hand(name, np.asarray(h[b])[inside], p) if used else np.zeros(u.shape[2:])
            np.testing.assert_allclose(u[b, j], want, atol=2e-5)


@pytest.mark.parametrize("name", ["mean", "max", "attention", "concat"])
def test_a_new_document_forgets_the_open_chunk(name):
    where, cfg = tokens([T], t=T), CFG[name]
    h = jax.random.normal(jax.random.key(0), (1, T, D))
    p, fresh = weights(name), (PlanState.empty(1), POOLS[name].init_state(cfg, D, 1, h.dtype))

    @jax.jit
    def call(h, mark, state):
        boundary = Boundary(mark=mark, kind=END)
        plan, planned = plan_lib.make_plan(boundary, where, 6, state[0])
        u, pooled = POOLS[name].apply(p, h, boundary, plan, state[1], cfg=cfg)
        return u, (planned, pooled)

    _, stale = call(h, jnp.zeros((1, T), bool), fresh)
    assert int(stale[0].open[0]) == T
    mark = random_marks(2, END, where)
    chex.assert_trees_all_equal(call(-h, mark, stale), call(-h, mark, fresh))


def test_kinds():
    check(START, "first")
    check(END, "mean")
    for kind, name, words in [
        (START, "mean", "'mean'.*'start'"),
        (END, "first", "'first'.*'end'"),
        (END, "median", "median"),
    ]:
        with pytest.raises(AtomError, match=words):
            check(kind, name)
    with pytest.raises(AtomError, match="heads: 3"):
        POOLS["attention"].spec(Chunking(heads=3), 8)


def test_dynamic_pooling_numbers(golden):
    """The published downsampling, null group in front, time first."""
    x = load_file(golden / "dynpool" / "dynpool.safetensors")
    h, mark = jnp.asarray(x["gumbel.hidden_pre"]).swapaxes(0, 1), jnp.asarray(x["gumbel.hard"]) > 0
    boundary, plan = plan_of(mark, tokens([39], [39], t=39), m=40, null=True)
    u, _ = pool("mean", h, boundary, plan)
    u = jnp.where(plan.null[:, :, None], x["w.null_group"], u[:, :, 0])
    for b, n in enumerate(np.asarray(plan.count)):
        np.testing.assert_allclose(u[b, :n], x["gumbel.down"][:n, b], atol=1e-6)
        assert not np.asarray(u[b, n:]).any()


def test_byte_latent_numbers(golden):
    x = load_file(golden / "blt" / "blt.safetensors")
    ids, h = x["glob.patch_ids"], jnp.asarray(x["reduce.h"])
    mark = jnp.asarray(np.append(ids[:, 1:] != ids[:, :-1], [[True]], axis=1))
    boundary, plan = plan_of(mark, tokens([40], t=40))
    n = ids.max() + 1
    for name, key in [("max", "reduce.amax"), ("mean", "reduce.mean")]:
        u, _ = pool(name, h, boundary, plan)
        np.testing.assert_allclose(u[:, :n, 0], x[key][:, :n], atol=1e-6)


def dense_mean(h, hard):
    """The published construction for one document: a membership matrix whose entries carry the gradient."""
    group = jnp.cumsum(hard) - hard
    own = jnp.arange(T)[None, :] == jnp.round(group)[:, None]
    moved = jnp.broadcast_to((1 + group - jax.lax.stop_gradient(group))[:, None], own.shape)
    w = jnp.where(own, moved, 0.0)
    total = w.sum(0)[:, None]
    return jnp.where(jnp.arange(T)[:, None] < hard.sum(), (w.T @ h) / jnp.broadcast_to(total + 1e-9, (T, D)), 0.0)


def test_gradient_of_mean_for_marks():
    """Equal to automatic differentiation of the published form, and one document's marks move no other document."""
    where = tokens([14], [6, 8], [9], t=T)
    mark = random_marks(7, END, where, rate=0.4)
    h, g = jax.random.normal(jax.random.key(0), (2, 3, T, D))

    @jax.jit
    @jax.grad
    def mine(inputs):
        boundary, plan = plan_of(mark, where)
        u, _ = pool("mean", inputs[0], boundary.replace(hard=inputs[1]), plan)
        return jnp.sum(u[:, :, 0] * g)

    dense = jax.jit(jax.grad(lambda h, hard, g: jnp.sum(dense_mean(h, hard) * g), argnums=(0, 1)))
    dh, db = mine((h, mark.astype(jnp.float32)))
    for b, (start, stop) in [(0, (0, 14)), (1, (0, 6)), (1, (6, 14)), (2, (0, 9))]:
        row, own = slice(start, stop), slice(0, stop - start)
        first = int(mark[b, :start].sum())
        hd = jnp.zeros((T, D)).at[own].set(h[b, row])
        # One unmarked position at the end stands for the padding of shorter documents.
        bd = jnp.zeros(T).at[own].set(mark[b, row])
        gd = jnp.zeros((T, D)).at[: T - first].set(g[b, first:])
        want_h, want_b = dense(hd, bd, gd)
        np.testing.assert_allclose(dh[b, row], want_h[own], atol=1e-6)
        np.testing.assert_allclose(db[b, row], want_b[own], atol=2e-6)
    assert not np.asarray(dh[2, 9:]).any() and not np.asarray(db[2, 9:]).any()


def test_gradient_of_max_is_shared_by_ties():
    x = jnp.asarray([[[1.0], [3.0], [3.0], [2.0]]])
    ids = jnp.asarray([[0, 0, 0, 2]])
    top, back = jax.vjp(lambda x: segment_max(x, ids, 3), x)
    np.testing.assert_array_equal(top[0, :, 0], [3.0, -jnp.inf, 2.0])
    np.testing.assert_array_equal(back(jnp.ones((1, 3, 1)))[0][0, :, 0], [0.0, 0.5, 0.5, 1.0])


@pytest.mark.parametrize("name", ["first", "last", "mean", "max", "attention", "concat"])
def test_gradients_are_finite_and_stay_inside(name):
    """Rows without chunks, unused slots and padding produce no gradient, and none that is not a number."""
    kind = START if name == "first" else END
    where = tokens([14], [5, 9], [], [9], t=T)
    mark = random_marks(2, kind, where).at[3].set(False)
    h = jax.random.normal(jax.random.key(0), (4, T, D))
    boundary, plan = plan_of(mark, where, kind, m=5)
    p = weights(name)
    loss = jax.jit(jax.grad(lambda p, h: jnp.sum(jnp.sin(pool(name, h, boundary, plan, p)[0])), argnums=(0, 1)))
    dp, dh = loss(p, h)
    chex.assert_tree_all_finite((dp, dh))
    assert not np.asarray(dh)[~np.asarray(plan.member)].any()
    assert np.asarray(dh)[0].any()
