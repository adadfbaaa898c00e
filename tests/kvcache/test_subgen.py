"""SubGen against clusters and reservoirs written down key by key, and what its estimates are on average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache import memory, policies, subgen
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.subgen import SubGen
from atom_jax.models.registry import with_memory
from atom_jax.nn.attention import Tokens
from atom_jax.session.reading import plan
from atom_jax.session.session import Session
from atom_jax.typing import AtomError
from tests.kvcache.test_memory_option import build

T, H, G, K, LAYER = 240, 2, 2, 8, 5
SIZES = Sizes(layers=2, b=1, h=H, g=G, k=K, dtype=jnp.float32)
POLICY = SubGen(budget=64, sinks=3, recent=0.2, values=0.4, samples=3, delta=2.5, seed=7, exact=False)


def draw(t=T, centres=30):
    """q [H, G, t, K], keys around some centres, and values of different norms [H, t, K]."""
    rng = np.random.default_rng(2)
    middle = rng.normal(size=(H, centres, K)) * 1.5
    of = rng.integers(centres, size=(H, t))
    k = np.take_along_axis(middle, of[..., None], 1) + rng.normal(size=(H, t, K)) * 0.3
    v = rng.normal(size=(H, t, K)) * rng.gamma(1.0, size=(H, t, 1))
    return tuple(x.astype(np.float32) for x in (rng.normal(size=(H, G, t, K)) * 1.5, k, v))


Q, KEYS, VALUES = draw()


def call(done, t, real=None, fresh=False, layer=LAYER):
    """The next t tokens of rows with `done`, of which `real` (default: all) count."""
    done = np.asarray(done, np.int32)
    at = np.minimum(done[:, None] + np.arange(t, dtype=np.int32)[None], T - 1)
    q, k, v = (np.stack([x[..., i, :] for i in at]) for x in (Q, KEYS, VALUES))
    real = np.full(len(done), t) if real is None else np.asarray(real)
    segments = (np.arange(t)[None] < real[:, None]).astype(np.int32)
    places = Tokens(jnp.asarray(at), jnp.asarray(segments))
    return Call(*map(jnp.asarray, (q, k, v)), places, jnp.asarray(done), layer=layer, fresh=fresh)


extend = jax.jit(lambda layer, call: layer.extend(call))


def empty(policy=POLICY, b=1):
    return jax.tree.map(lambda x: x[0], policy.init(SIZES._replace(b=b), 16, (0, 1)))


@dataclasses.dataclass
class Sketch:
    """Of one head: every cluster's first key, count and samples, and the drawn tokens."""

    policy: SubGen
    clusters: list
    drawn: list
    mass: float = 0.0

    def add(self, k, v, coins):
        far = [np.sum((first - k) ** 2) for first, _, _ in self.clusters]
        room = len(self.clusters) < self.policy.clusters
        if not far or (room and min(far) > self.policy.delta**2):
            self.clusters.append([k, 0, [None] * self.policy.samples])
            far.append(0.0)
        one = self.clusters[int(np.argmin(far))]
        one[1] += 1
        one[2] = [k if u < 1 / one[1] else old for u, old in zip(coins, one[2])]
        self.mass += v @ v
        coins = coins[self.policy.samples :]
        self.drawn = [(k, v) if u < v @ v / self.mass else old for u, old in zip(coins, self.drawn)]

    def held(self):
        drawn = [k for k, _ in self.drawn] if self.mass else []
        return drawn + [k for _, _, some in self.clusters for k in some]

    def sums(self, q):
        below = sum(n * np.mean([np.exp(q @ k) for k in some]) for _, n, some in self.clusters)
        if not self.mass:
            return np.zeros(K), below
        return np.mean([np.exp(q @ k) * v * self.mass / (v @ v) for k, v in self.drawn], axis=0), below


def naive(policy, t=T):
    """Outputs [H, G, t, K], and the sketch of every head, of a text in which every token reads the sketch."""
    q, k, v = (x[..., :t, :].astype(np.float64) for x in (Q, KEYS, VALUES))
    places = jnp.arange(t)
    coins = np.asarray(subgen._coins(policy.seed, LAYER, places, (H, policy.samples + policy.drawn)))
    out, sketches = np.zeros((H, G, t, K)), []
    for h in range(H):
        sketch = Sketch(policy, [], [None] * policy.drawn)
        for i in range(t):
            if (gone := i - policy.newest) >= policy.sinks:
                sketch.add(k[h, gone], v[h, gone], coins[gone, h])
            apart = [j for j in range(i + 1) if j < policy.sinks or j > i - policy.newest]
            for g in range(G):
                one = q[h, g, i] / K**0.5
                weights = np.exp(k[h, apart] @ one)
                above, below = sketch.sums(one)
                # Never below the term of a key that is held.
                least = max([0.0, *(np.exp(one @ x) for x in sketch.held())])
                out[h, g, i] = (above + weights @ v[h, apart]) / max(below + weights.sum(), least)
        sketches.append(sketch)
    return out, sketches


def same(one, other):
    """Two memories: clusters and draws are equal, and mass but for rounding."""
    for field in dataclasses.fields(one):
        if field.name != "policy":
            np.testing.assert_allclose(getattr(one, field.name), getattr(other, field.name), rtol=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        dataclasses.replace(POLICY, delta=0.0),
        dataclasses.replace(POLICY, sinks=0, recent=0.0, samples=1, budget=200, delta=1.5),
    ],
    ids=["clusters", "limit", "all"],
)
def test_clusters_and_estimates_are_those_of_the_definition(policy):
    want, sketches = naive(policy)
    out, layer = extend(empty(policy), call([0], T, fresh=True))
    np.testing.assert_allclose(out[0], want, atol=1e-4, rtol=1e-4)
    held = [len(sketch.clusters) for sketch in sketches]
    assert min(held) > 5 and (policy.delta > 0 or held == [policy.clusters] * H)
    for h, sketch in enumerate(sketches):
        count = np.asarray(layer.count[0, h])
        assert count[: held[h]].tolist() == [n for _, n, _ in sketch.clusters] and not count[held[h] :].any()
        for a, (first, _, some) in enumerate(sketch.clusters):
            np.testing.assert_array_equal(layer.first[0, h, a], first.astype(np.float32))
            np.testing.assert_array_equal(layer.samples[0, h, a], np.float32(some))
        np.testing.assert_array_equal(layer.drawn_v[0, h], np.float32([v for _, v in sketch.drawn]))
    assert int(layer.count[0].sum()) == H * (T - policy.sinks - policy.newest)
    keys = np.array(held) * (1 + policy.samples)
    apart = policy.sinks + policy.newest
    np.testing.assert_array_equal(layer.held(np.array([T]))[0], apart + policy.drawn + (keys + 1) // 2)


def test_both_sums_are_right_on_average():
    """Over many layers, whose coins differ; and the denominator is exact where each key is a cluster."""
    t, n = 60, 2000
    policy = dataclasses.replace(POLICY, budget=30, sinks=1, recent=0.1, delta=2.0)
    last = call([t - 1], 1)
    q, k, v = (x[..., :t, :].astype(np.float64) for x in (Q, KEYS, VALUES))
    weights = np.exp(np.einsum("hgk,hsk->hgs", q[..., -1, :], k) / K**0.5)
    above, below = np.einsum("hgs,hsk->hgk", weights, v), weights.sum(-1)

    def one(layer, number):
        _, after = layer.extend(call([0], t, fresh=True, layer=number))
        top, *sums = after.sums(last.q[..., 0, :], jnp.array([t]))
        return [x[0] * jnp.exp(top[0]).reshape(H, G, *[1] * (x.ndim - 3)) for x in sums]

    found = jax.jit(lambda layer: jax.lax.map(lambda i: one(layer, i), jnp.arange(n), batch_size=200))(empty(policy))
    for got, want in zip(found, (above, below)):
        got = np.asarray(got, np.float64)
        error = got.std(0) / n**0.5
        assert (error > 0).all() and (error < 0.15 * np.abs(want).max()).all()
        assert (np.abs(got.mean(0) - want) < 5 * error).all()
        assert (np.abs(got - want) > 10 * error).any(), "one draw alone is further away"

    alone = dataclasses.replace(policy, budget=400, values=0.1, samples=1, delta=0.0)
    got = np.asarray(jax.jit(one)(empty(alone), 0)[1])
    np.testing.assert_allclose(got, below, rtol=1e-5)


def test_a_text_that_is_kept_apart_is_attended_to_exactly():
    policy = SubGen(budget=64, sinks=4)
    assert policy.sinks + policy.newest == 36
    state, exact = empty(dataclasses.replace(policy, exact=False)), empty(policy)
    (out, state), (want, exact) = (extend(x, call([0], 36, fresh=True)) for x in (state, exact))
    np.testing.assert_allclose(out, want, atol=2e-6)
    assert not state.count.any() and state.held(np.array([36])).tolist() == [[36] * H]


@pytest.mark.parametrize("exact", [False, True])
def test_cuts_company_and_single_tokens_change_nothing(exact):
    """The memory is the same; so are outputs, but those of a prompt that is read exactly."""
    policy, lengths = dataclasses.replace(POLICY, exact=exact), np.array([73, 30, 73])
    whole_out, whole = extend(empty(policy, 3), call([0, 0, 0], 73, lengths, True))
    done, outs, cut = np.zeros(3, int), [], empty(policy, 3)
    for t in (24, 1, 24, 24):
        real = np.clip(lengths - done, 0, t)
        out, cut = extend(cut, call(done, t, real, fresh=not outs))
        outs.append(out)
        done = done + real
    same(whole, cut)
    steps, single = [], empty(policy, 3)
    for i in range(73):
        real = i < lengths
        out, single = extend(single, call(np.minimum(i, lengths), 1, real, fresh=i == 0))
        steps.append(out)
    same(whole, single)
    outs, steps = jnp.concatenate(outs, 3), jnp.concatenate(steps, 3)
    np.testing.assert_array_equal(outs[0], outs[2])
    for row, n in enumerate(lengths):
        later = slice(24 if exact else 0, n)
        np.testing.assert_allclose(outs[row, ..., later, :], steps[row, ..., later, :], atol=1e-5)
        if not exact:
            np.testing.assert_allclose(whole_out[row, ..., :n, :], steps[row, ..., :n, :], atol=1e-5)
    alone = extend(empty(policy), call([0], 73, fresh=True))
    np.testing.assert_allclose(alone[0][0], whole_out[0], atol=1e-5)
    same(alone[1], jax.tree.map(lambda x: x[:1], whole))


def test_coins_differ_between_heads_layers_and_seeds():
    policy = dataclasses.replace(POLICY, delta=100.0)
    found = []
    for seed, layer in ((0, 1), (0, 2), (1, 1), (0, 1)):
        one = empty(dataclasses.replace(policy, seed=seed))
        found.append(extend(one, call([0], T, fresh=True, layer=layer))[1].drawn_v)
    np.testing.assert_array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    coins = np.asarray(subgen._coins(0, 1, jnp.arange(50), (H, 9))).reshape(50, -1)
    assert len(np.unique(coins)) > 0.99 * coins.size


@pytest.mark.parametrize("budget", [6, 7, 32, 33, 512, 1024])
@pytest.mark.parametrize("more", ["", ",samples=4,recent=0.9,values=1", ",sinks=0,recent=1,values=0"])
def test_memory_is_no_larger_than_its_budget(budget, more):
    policy = policies.parse(f"subgen:budget={max(budget, 8 if 'samples' in more else 6)}{more}")
    layer = jax.eval_shape(lambda: empty(policy))
    entries = (layer.k, layer.v, layer.first, layer.samples, layer.drawn_k, layer.drawn_v)
    size = sum(x.size for x in entries)
    assert size <= policy.budget * H * 2 * K and size >= (policy.budget - policy.samples) * H * 2 * K
    rest = H * 4 * (policy.clusters + 1)
    assert memory.nbytes(memory.Memory((layer,), None)) == 4 * size + rest
    assert policy.expected(10**6) <= policy.budget and policy.expected(2) == 2


def test_a_model_says_the_same_however_rows_are_batched_and_cut():
    lm = with_memory(build(), policies.parse("subgen:budget=24,delta=2"))
    rows = [list(range(3, 60)), list(range(60, 20, -1))]
    both = atom_jax.generate(lm, rows, 12, keep_memory=True)
    assert [atom_jax.generate(lm, [row], 12).ids[0] for row in rows] == both.ids
    held, _ = memory.use(both.memory.memory)
    assert (np.asarray(held) <= 24).all() and (np.asarray(held) > 20).all()
    assert not plan(lm.config).pieces
    streamed = with_memory(lm, policies.parse("subgen:budget=24,delta=2,exact=false"))
    assert plan(streamed.config).pieces
    cut = Session.prefill(streamed, [row[:17] for row in rows]).extend([row[17:] for row in rows])
    np.testing.assert_allclose(cut.logits, Session.prefill(streamed, rows).logits, atol=1e-4)


def test_too_little_is_refused():
    for text, says in (
        ("subgen", "at least 6"), ("subgen:budget=5", "at least 6"), ("subgen:budget=9,samples=0", "samples"),
        ("subgen:budget=9,delta=-1", "delta"), ("subgen:budget=9,recent=2", "recent"),
        ("subgen:ratio=0.5", "'ratio'"),
    ):  # fmt: skip
        with pytest.raises(AtomError, match=says):
            policies.parse(text)
