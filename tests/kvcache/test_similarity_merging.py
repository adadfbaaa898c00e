"""D2O and KVMerger next to their formulas written down, entry by entry, and where it is known what they must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache import readings
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.policies import parse
from atom_jax.typing import AtomError
from tests.kvcache.test_policies import LENGTHS, SIZES, extend, later, layer, prompt, tensors

STEPS = 12


def started(text, call=None, lengths=LENGTHS):
    """One layer under a policy, once it has read a prompt."""
    _, state = extend(layer(parse(text).init(SIZES, 60, (0, 1, 2))), prompt() if call is None else call)
    settled = readings.settle(Memory((state,), jnp.asarray(lengths))).layers[0]
    return settled.grow(lengths, 1)


def by_position(state, row, head):
    """{position: [key, value, score]} of what a head holds."""
    pos, k, v, score = (np.asarray(x)[row, head] for x in (state.pos, state.k, state.v, state.score))
    return {int(p): [k[i], v[i], score[i]] for i, p in enumerate(pos) if p >= 0}


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def weights(query, keys):
    """Attention [g, s] of one token's queries [g, k]."""
    w = np.exp(query @ np.stack(keys).T / np.sqrt(query.shape[-1]))
    return w / w.sum(-1, keepdims=True)


class Head:
    """One head that keeps `limit` entries, {position: [key, value, attention received]}."""

    def __init__(self, policy, q, k, v, n):
        self.p, self.limit, self.held = policy, policy.budget, {i: [k[i], v[i], 0.0] for i in range(n)}
        for i in range(n):
            for j, w in enumerate(weights(q[:, i], k[: i + 1]).sum(0)):
                self.held[j][2] += w
        self.begin(n)

    def loose(self, last):
        """Positions that may leave, the least first."""
        free = [i for i in self.held if self.p.sinks <= i <= last - self.recent]
        return sorted(free, key=lambda i: (self.held[i][2], i))

    def step(self, at, q, k, v):
        if len(self.held) == self.limit:
            self.leave(self.loose(at - 1)[0], at - 1)
        self.held[at] = [k, v, 0.0]
        every = list(self.held.values())
        w = weights(q, [e[0] for e in every])
        for e, x in zip(every, w.sum(0)):
            e[2] += x
        return w @ np.stack([e[1] for e in every])

    def mean(self, into, others):
        """Keys and values of an entry with weight w become means with [(entry, weight)]. into: (position, weight)."""
        every = [(self.held[into[0]], into[1]), *others]
        total = sum(w for _, w in every)
        self.held[into[0]][:2] = [sum(w * e[x] for e, w in every) / total for x in (0, 1)]


class D2OHead(Head):
    @property
    def recent(self):
        return self.limit // 2

    def nearest(self, entry):
        return max((cosine(entry[0], e[0]), j) for j, e in self.held.items())

    def begin(self, n):
        gone = [self.held.pop(i) for i in self.loose(n - 1)[: max(n - self.limit, 0)]]
        found = [(*self.nearest(e), e) for e in gone]
        self.threshold = np.mean([u for u, _, _ in found]) if found else None
        for j in {j for _, j, _ in found}:
            self.mean((j, np.e), [(e, np.exp(u)) for u, i, e in found if i == j and u >= self.threshold])

    def leave(self, victim, last):
        entry = self.held.pop(victim)
        u, j = self.nearest(entry)
        old = self.threshold
        self.threshold = u if old is None else self.p.smoothing * u + (1 - self.p.smoothing) * old
        if u >= self.threshold:
            self.mean((j, np.e), [(entry, np.exp(u))])


class KVMergerHead(Head):
    @property
    def recent(self):
        return self.limit // 3

    def near(self, entry, pivot):
        return np.exp(-np.sum((entry[0] - pivot[0]) ** 2) / (2 * self.p.sigma**2))

    def begin(self, n):
        loose = self.loose(n - 1)
        free = set(loose[: max(len(loose) - self.limit // 4, 0)])
        u = {i: cosine(self.held[i][0], self.held[i - 1][0]) for i in free if i - 1 in free}
        likely = sorted((i for i in u if u[i] > self.p.threshold), key=lambda i: -u[i])
        joined, sets = likely[: max(n - self.limit, 0)], []
        for i in range(n):
            sets = [*sets[:-1], [*sets[-1], i]] if i in joined else [*sets, [i]]
        for members in sets:
            pivot = max(members, key=lambda i: self.held[i][2])
            others = [self.held.pop(i) for i in members if i != pivot]
            self.mean((pivot, 1.0), [(e, self.near(e, self.held[pivot])) for e in others])
        self.joined = len(joined)
        for i in self.loose(n - 1)[: max(len(self.held) - self.limit, 0)]:
            self.held.pop(i)

    def leave(self, victim, last):
        entry = self.held.pop(victim)
        beside = [max((i for i in self.held if i < victim), default=None)]
        beside += [min((i for i in self.held if i > victim), default=None)]
        beside = [i for i in beside if i in self.loose(last)]
        best = max(((cosine(entry[0], self.held[i][0]), i) for i in beside), default=(0, 0))
        if best[0] > self.p.threshold:
            self.joined += 1
            self.mean((best[1], 1.0), [(entry, self.near(entry, self.held[best[1]]))])


CASES = {
    "d2o:budget=8,sinks=2": D2OHead, "d2o:budget=7,sinks=0,smoothing=0.2": D2OHead,
    # Some sets are as large as the limit asks, some too small.
    "kvmerger:budget=9,threshold=0.1,sigma=3": KVMergerHead,
    "kvmerger:budget=12,threshold=0.4,sigma=0.8,sinks=1": KVMergerHead,
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_like_the_formulas(text):
    policy, state, outs = parse(text), started(text), []
    heads = {}
    for row, n in enumerate(LENGTHS):
        for head in range(2):
            q, k, v = (np.asarray(x[row, head], np.float64) for x in tensors())
            heads[row, head] = CASES[text](policy, q, k, v, n)
            same(by_position(state, row, head), heads[row, head].held)
    for i in range(STEPS):
        call = later(LENGTHS + i)
        out, state = extend(state, call)
        outs.append(out)
        for (row, head), one in heads.items():
            q, k, v = (
                np.asarray(x[row, head], np.float64) for x in (call.q[..., 0, :], call.k[:, :, 0], call.v[:, :, 0])
            )
            np.testing.assert_allclose(out[row, head, :, 0], one.step(LENGTHS[row] + i, q, k, v), atol=1e-4)
    for (row, head), one in heads.items():
        same(by_position(state, row, head), one.held)
        if policy.name == "d2o":
            np.testing.assert_allclose(state.extra[row, head], one.threshold, atol=1e-5)
    assert policy.name == "d2o" or max(one.joined for one in heads.values()) > 4


def same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for i, entry in ours.items():
        for x in range(3):
            np.testing.assert_allclose(entry[x], theirs[i][x], atol=2e-4)


def planted(k_of):
    """A prompt of 20 tokens in every row, whose keys [3, 2, 20, 8] are changed. All queries are 0: the later a token
    stands, the less attention it receives."""
    call = prompt(np.array([20, 20, 20]), t=20)
    return call.replace(q=jnp.zeros_like(call.q), k=jnp.asarray(k_of(np.array(call.k))))


def test_d2o_merges_equal_keys_and_drops_what_is_unlike_all_others():
    """Of 20 tokens the first 6 and the last 6 stay. Tokens 10 and 11 have the key of token 2, up to its length."""

    def keys(k):
        k[:] = np.eye(8)[np.arange(20) % 4]
        k[:, :, 10:12] = 3 * np.eye(8)[5]
        k[:, :, 2] = np.eye(8)[5]
        # Like nothing that stays.
        k[:, :, [6, 7, 8, 9, 12, 13]] = -np.ones(8)
        return k

    call = planted(keys)
    state = started("d2o:budget=12,sinks=0", call, np.array([20, 20, 20]))
    held = by_position(state, 1, 1)
    assert sorted(held) == [0, 1, 2, 3, 4, 5, *range(14, 20)]
    np.testing.assert_allclose(held[2][0], (1 + 3 + 3) / 3 * np.eye(8)[5], atol=1e-5)
    np.testing.assert_allclose(held[2][1], np.asarray(call.v)[1, 1, [2, 10, 11]].mean(0), atol=1e-5)
    for i in set(held) - {2}:
        np.testing.assert_array_equal(held[i][:2], [call.k[1, 1, i], call.v[1, 1, i]])
    # The mean of two times 1 and six times the cosine with a unit vector.
    np.testing.assert_allclose(state.extra, (2 - 6 / np.sqrt(8)) / 8, atol=1e-5)


def test_d2o_asks_its_threshold_whenever_an_entry_leaves():
    state = started("d2o:budget=8,smoothing=0")
    slot, live = jnp.argmin(state.pos, axis=-1), state.n > 0
    drops = state.replace(extra=jnp.full_like(state.extra, 1.0))
    after = drops.policy.absorb(drops, slot, live)
    jax.tree.map(np.testing.assert_array_equal, after, drops)
    takes = state.replace(extra=jnp.full_like(state.extra, -1.0))
    after = takes.policy.absorb(takes, slot, live)
    np.testing.assert_array_equal((after.k != takes.k).any(-1).sum(-1), 1)
    np.testing.assert_array_equal((after.v != takes.v).any(-1).sum(-1), 1)


def test_layers_of_d2o_share_their_budget_by_the_variance_of_attention():
    rng = np.random.default_rng(0)
    lengths, sizes = np.array([40, 23, 9]), SIZES._replace(h=3)
    for text, base in (("budget=10", [10, 10, 10]), ("ratio=0.4", [16, 9, 3])):
        policy = parse(f"d2o:{text}")
        layers = policy.init(sizes, 48, (0, 1, 2))
        score = rng.exponential(size=layers.pos.shape).astype(np.float32) ** 3
        pos = np.where(np.arange(48) < lengths[:, None, None], np.arange(48), -1)
        layers = layers.replace(score=jnp.asarray(score), pos=jnp.broadcast_to(jnp.asarray(pos), layers.pos.shape))
        f = np.zeros((3, 3))
        for i in range(3):
            for row, n in enumerate(lengths):
                var = score[i, row, :, :n].astype(np.float64).var(-1, ddof=1)
                f[i, row] = ((var - var.min()) / (var.max() - var.min())).mean()
        part = np.exp(-f) / np.exp(-f).sum(0)
        want = np.minimum(np.rint(3 * part * base), lengths if policy.ratio else 99).astype(int)
        np.testing.assert_array_equal(policy.limits(layers, jnp.asarray(lengths)), want)
        settled = policy.settle(layers.replace(n=layers.n + lengths[None, :, None]), jnp.asarray(lengths))
        np.testing.assert_array_equal(settled.limit, np.repeat(want[..., None], 3, 2))
        np.testing.assert_array_equal(settled.n, np.minimum(settled.limit, lengths[:, None]))


def test_layers_of_d2o_whose_heads_are_alike_but_for_rounding_get_the_same():
    policy, rng = parse("d2o:ratio=0.5"), np.random.default_rng(0)
    layers = policy.init(SIZES._replace(h=3), 48, (0, 1, 2))
    pos = jnp.broadcast_to(jnp.arange(48), layers.pos.shape)
    score = rng.exponential(size=48) * (1 + 1e-6 * rng.normal(size=layers.pos.shape))
    limits = policy.limits(layers.replace(pos=pos, score=jnp.asarray(score, jnp.float32)), jnp.array([47, 47, 47]))
    np.testing.assert_array_equal(limits, 23)


def test_kvmerger_makes_one_entry_of_a_run_of_equal_keys():
    """Of 20 tokens 15 stay: the newest 5, the 3 that received most attention, and of 12 to 14 and 6 to 9 one each."""

    def keys(k):
        k[:] = np.eye(8)[np.arange(20) % 8]
        k[:, :, 12:15] = np.ones(8)
        k[:, :, 6:10] = -np.ones(8)
        return k

    call = planted(keys)
    held = by_position(started("kvmerger:budget=15", call, np.array([20, 20, 20])), 2, 0)
    # The first of a run received most attention.
    assert sorted(held) == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, *range(15, 20)]
    for first, run in ((12, [12, 13, 14]), (6, [6, 7, 8, 9])):
        np.testing.assert_allclose(held[first][0], call.k[2, 0, first], atol=1e-6)
        np.testing.assert_allclose(held[first][1], np.asarray(call.v)[2, 0, run].mean(0), atol=1e-5)
    for i in set(held) - {6, 12}:
        np.testing.assert_array_equal(held[i][:2], [call.k[2, 0, i], call.v[2, 0, i]])
    # With less room, the least attended leave as well, and with more of it, fewer are merged.
    few, many = (by_position(started(f"kvmerger:budget={n}", call, np.array([20, 20, 20])), 2, 0) for n in (12, 18))
    assert len(few) == 12 and set(few) < {*held, 16} and len(many) == 18
    np.testing.assert_array_equal(many[19][0], call.k[2, 0, 19])


def test_values_close_to_the_pivot_weigh_more():
    """Two neighbours whose keys have the same direction and differ in length by 2."""

    def keys(k):
        k[:] = np.eye(8)[np.arange(20) % 8]
        k[:, :, 11] = 3 * k[:, :, 10]
        return k

    call, v = planted(keys), np.asarray(prompt().v)[0, 0]
    held = by_position(started("kvmerger:budget=19,sigma=1.5", call, np.array([20, 20, 20])), 0, 0)
    assert 11 not in held
    weight = np.exp(-(2.0**2) / (2 * 1.5**2))
    np.testing.assert_allclose(held[10][1], (v[10] + weight * v[11]) / (1 + weight), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(held[10][0]), (1 + 3 * weight) / (1 + weight), rtol=1e-5)


@pytest.mark.parametrize("field", ["d2o smoothing=1.5", "kvmerger threshold=2", "kvmerger sigma=0"])
def test_numbers_out_of_range(field):
    name, wrong = field.split()
    with pytest.raises(AtomError, match=wrong.split("=")[0]):
        parse(f"{name}:budget=4,{wrong}")
