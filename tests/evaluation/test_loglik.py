import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import sharding
from atom_jax.evaluation import loglik
from atom_jax.evaluation.encode import Item
from atom_jax.models import transformer
from atom_jax.typing import AtomError, Batch

APPLY = jax.jit(transformer.apply, static_argnames="cfg")
RNG = np.random.default_rng(0)
ITEMS = [
    Item(RNG.integers(0, 264, n).astype(np.int32), start)
    for n, start in [(2, 1), (5, 1), (5, 4), (17, 9), (18, 17), (33, 1), (40, 20), (61, 30), (64, 63), (30, 2)]
]
# Three ways to go on from one context, and one item twice.
ITEMS += [Item(np.append(ITEMS[3].ids, i).astype(np.int32), 17) for i in (1, 2, 3)] + [ITEMS[6]]


def direct(lm, item, width=72):
    """One sequence by itself, with all its logits; padded to `width` so that it compiles once."""
    n = len(item.ids)
    ids = jnp.asarray(np.pad(item.ids, (0, width - n)))[None]
    positions = jnp.arange(width, dtype=jnp.int32)[None]
    batch = Batch(ids=ids, positions=positions, segments=(positions < n).astype(jnp.int32))
    logits = APPLY(lm.params, batch, cfg=lm.config)[0].logits[0, item.start - 1 : n - 1]
    target = item.ids[item.start :]
    logprob = jax.nn.log_softmax(logits)[np.arange(len(target)), target].sum()
    return float(logprob), bool((logits.argmax(axis=1) == target).all())


def collect(lm, items, batch_tokens, mesh=None, multiple=1):
    scores = {}
    for one, some in loglik.score(lm, items, loglik.plan(items, batch_tokens, multiple), batch_tokens, mesh):
        scores.update(zip(one.items, some))
    return [scores[i] for i in range(len(items))]


def test_equals_the_direct_computation(lm, monkeypatch):
    expected = [direct(lm, item) for item in ITEMS]
    assert direct(lm, ITEMS[3], width=17) == pytest.approx(expected[3], abs=1e-4)
    monkeypatch.setattr(loglik, "BLOCK", 7 * lm.config.vocab_size)  # several blocks in a batch
    for batch_tokens in (1, 100, 1000):
        found = collect(lm, ITEMS, batch_tokens)
        np.testing.assert_allclose([s.logprob for s in found], [e[0] for e in expected], atol=2e-4)
        assert [s.greedy for s in found] == [e[1] for e in expected]


def test_greedy_is_found(lm):
    ids = [5, 6]
    for _ in range(3):
        batch = Batch(jnp.array([ids]), jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), jnp.int32))
        ids.append(int(APPLY(lm.params, batch, cfg=lm.config)[0].logits[0, -1].argmax()))
    right = Item(np.array(ids, np.int32), 2)
    wrong = Item(np.array([*ids[:-1], (ids[-1] + 1) % 264], np.int32), 2)
    assert [s.greedy for s in collect(lm, [right, wrong], 100)] == [True, False]


def test_uniform_model(uniform):
    for item, score in zip(ITEMS, collect(uniform, ITEMS, 100)):
        np.testing.assert_allclose(score.logprob, -np.log(264) * (len(item.ids) - item.start), rtol=1e-5)


def test_plan_shares_rows_and_bounds_batches():
    work = loglik.plan(ITEMS, 100)
    assert sorted(i for w in work for i in w.items) == list(range(len(ITEMS)))
    # 14 items, of which three go on from one context, two are the same, and two differ in their start only.
    assert sum(len(w.rows) for w in work) == 14 - 2 - 1
    assert [w.length for w in work] == sorted((w.length for w in work), reverse=True)
    for w in work:
        assert len(w.rows) <= loglik.row_count(w.length, 100) and max(map(len, w.rows)) <= w.length
        for i, r in zip(w.items, w.row_of):
            assert np.array_equal(w.rows[r], ITEMS[i].ids[:-1])


def test_buckets():
    assert [loglik.bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 64, 65, 96, 97)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 64, 96, 96, 128,
    ]  # fmt: skip
    assert loglik.row_count(48, 100) == 2 and loglik.row_count(128, 100) == 1 and loglik.row_count(16, 100, 4) == 4


def test_few_compilations(lm):
    items = [Item(RNG.integers(0, 264, n).astype(np.int32), 1) for n in range(2, 60)]
    before = loglik.states._cache_size(), loglik.head._cache_size()
    collect(lm, items, 96)
    states, heads = loglik.states._cache_size() - before[0], loglik.head._cache_size() - before[1]
    assert states <= 6 and heads <= 1


def test_no_logits_for_unscored_positions(lm):
    jaxpr = jax.make_jaxpr(lambda p, x, i, t: loglik.head(p, x, i, t, cfg=lm.config))(
        lm.params, jnp.zeros((128, 16)), jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32)
    )
    assert "f32[128,264]" not in str(jaxpr) and "f32[1,4,264]" in str(jaxpr)


def test_on_a_mesh(lm):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = dataclasses.replace(
        lm, params=jax.device_put(lm.params, sharding.shardings(transformer.spec(lm.config), mesh))
    )
    with jax.set_mesh(mesh):
        found = collect(placed, ITEMS, 100, mesh, multiple=4)
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in collect(lm, ITEMS, 100)], atol=2e-4)


def test_not_finite(lm):
    broken = dataclasses.replace(lm, params=lm.params | {"norm": lm.params["norm"] * jnp.nan})
    with pytest.raises(AtomError, match="log-likelihood of nan"):
        collect(broken, ITEMS[:1], 100)


@pytest.mark.parametrize("item", [Item(np.arange(3, dtype=np.int32), 0), Item(np.arange(3, dtype=np.int32), 3)])
def test_nothing_to_score(item):
    with pytest.raises(AtomError, match="cannot be scored"):
        loglik.plan([item], 100)
