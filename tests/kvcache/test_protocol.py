"""What must hold for every kind of memory: of every policy in the table, the dense cache and the ring."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from atom_jax import config
from atom_jax.kvcache import memory, policies, readings
from atom_jax.kvcache.budget import Budget
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.dmc.decide import Said
from atom_jax.kvcache.dms import DMS, Revised
from atom_jax.kvcache.layer import Call, Layer, Sizes
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.kvcache.policies import empty, parse
from atom_jax.kvcache.policy import PerLayer, Policy, policies_of, policy_of
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

B, H, G, K, TEXT = 3, 2, 2, 8, 80
SIZES = Sizes(layers=2, b=B, h=H, g=G, k=K, dtype=jnp.float32)
LENGTHS = np.array([24, 15, 7])
DMS_FORMS = {
    "dms-borrowed": DMS("borrowed", window=5, page=4, scale=1.0, offset=0.0),
    "dms-adapter": DMS("adapter", window=5, page=4, scale=1.0, offset=0.0, sinks=2, per="layer"),
    "dms-observed": DMS("observed", window=5, page=4, scale=1.0, offset=0.0),
    "dms-separators": DMS("separators", window=5, page=4, sinks=2, separators=(1, 3)),
}
DMC_FORMS = {
    "dmc-borrowed": DMC("borrowed", span=4, page=4, offset=0.0),
    "dmc-adapter": DMC("adapter", page=4, scale=1.0, offset=0.0, sinks=2, mass=True),
    "dmc-observed": DMC("observed", window=5, page=4, scale=1.0, offset=0.0, sinks=2, mass=True, turned=True),
}
LOOKS = {"every": 4, "share": 0.9, "window": 5, "page": 4, "sinks": 2}
REVISED = {
    "revised-all": Revised(**LOOKS),
    "revised-observed": Revised.of(DMS_FORMS["dms-observed"], **LOOKS),
}
TEXTS = {
    "snapkv": "window=4", "pyramidkv": "window=4", "adakv": "window=4", "streaming_llm": "sinks=2",
    "expected_attention": "sinks=2,future=5", "quest": "page=4", "sepllm": "sinks=2,window=3",
    "razor_attention": "sinks=2",
}  # fmt: skip
BUDGETS = {
    name: parse(f"{name}:budget=10,{TEXTS.get(name, '')}")
    for name, kind in policies.POLICIES.items()
    if issubclass(kind, Budget)
}
BUDGETS["sepllm"] = dataclasses.replace(BUDGETS["sepllm"], separators=(1, 3))
BUDGETS["razor_attention"] = dataclasses.replace(BUDGETS["razor_attention"], heads=((0, 1),))
# Texts are longer than what is kept apart.
SKETCHES = {
    "subgen": parse("subgen:budget=10,sinks=1,samples=2,delta=3"),
    "subgen-streamed": parse("subgen:budget=10,sinks=1,recent=0.3,delta=3,exact=false"),
}
# Name: policy and window of the layer.
CASES: dict[str, tuple[Policy | None, int | None]] = {
    "dense": (None, None), "ring": (None, 6),
    **{name: (p, None) for name, p in (DMS_FORMS | DMC_FORMS | REVISED | BUDGETS | SKETCHES).items()},
    "tova-sliding": (BUDGETS["tova"], 9),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


@functools.cache
def tensors() -> tuple:
    """q, k, v, and what is said of every token, of texts longer than any here."""
    rng = np.random.default_rng(0)
    shapes = ((B, H, G, TEXT, K), (B, H, TEXT, K), (B, H, TEXT, K), (B, H, TEXT))
    return tuple(rng.normal(size=s).astype(np.float32) * 1.5 for s in shapes)


def call(name: str, done: Any, real: Any, t: int, fresh: bool = False, rows: Any = range(B)) -> Call:
    """The next tokens of rows of the texts, which have `done`: t columns of which `real` count."""
    rows, done = np.asarray(rows), np.asarray(done, np.int32)
    at = np.minimum(done[:, None] + np.arange(t, dtype=np.int32)[None], TEXT - 1)
    q, *kv = (x[rows] for x in tensors())
    q = np.take_along_axis(q, at[:, None, None, :, None], 3)
    k, v, said = (np.take_along_axis(x, at[:, None, :, None][..., : x.ndim], 2) if x.ndim == 4
                  else np.take_along_axis(x, at[:, None], 2) for x in kv)  # fmt: skip
    seen = jnp.ones((3, H)) * jnp.array([[1.0], [-1.0], [0.1]])
    names = "observed", "alpha_observed", "weight_observed"
    learned = dict.fromkeys(names, seen) if name.endswith("observed") else None
    if name in DMC_FORMS:
        said = Said(jnp.asarray(said), jnp.exp(said))
    segments = (np.arange(t)[None] < np.asarray(real)[:, None]).astype(np.int32)
    return Call(
        *map(jnp.asarray, (q, k, v)), Tokens(jnp.asarray(at), jnp.asarray(segments)), jnp.asarray(done), k_plain=k,
        ids=at % 5, said=said, learned=learned, window=CASES[name][1], fresh=fresh,
    )  # fmt: skip


extend, attend, store, one_by_one = (
    jax.jit(lambda layer, call, f=f: getattr(layer, f)(call)) for f in ("extend", "attend", "store", "one_by_one")
)


def start(name: str, b: int = B, rows: Any = range(B)) -> Layer:
    """A layer that has read the prompts."""
    policy, window = CASES[name]
    stack = empty(policy, SIZES._replace(b=b), 24, (0, 1), window)
    layer, lengths = jax.tree.map(lambda x: x[0], stack.states), LENGTHS[np.asarray(rows)]
    layer = extend(layer, call(name, np.zeros(b), lengths, 24, True, rows))[1]
    if policy is None or type(policy).settle is Policy.settle:
        return layer
    again = layer
    for i in range(1, policy.passes):
        again = extend(again, call(name, i * lengths, lengths, 24, rows=rows).replace(reading=i))[1]
    settled = readings.settle(Memory((layer,), lengths), Memory((again,), policy.passes * lengths)).layers[0]
    return settled.grow(lengths, 1)


def same(name: str, one: Layer, other: Layer, done: np.ndarray, rows: Any = range(B)) -> None:
    """Two memories hold as much, and answer alike for some tokens to come."""
    np.testing.assert_array_equal(one.held(done), other.held(done))
    for _ in range(4):
        step = call(name, done, np.ones(len(done)), 1, rows=rows)
        (out, one), (expected, other) = extend(one, step), extend(other, step)
        np.testing.assert_allclose(out, expected, atol=2e-6)
        done = done + 1
    np.testing.assert_array_equal(one.held(done), other.held(done))


@every
def test_drafts_are_verified_and_taken_back(name):
    """Attention to a draft is that of its tokens one after another; the memory then keeps those accepted."""
    layer = start(name).grow(LENGTHS, 6)
    draft = call(name, LENGTHS, [6, 6, 4], 6)
    out = attend(layer, draft)
    accepted = np.array([3, 6, 0])
    kept = store(layer, draft.first(accepted))
    plain = layer
    for i in range(6):
        real = i < accepted
        expected, after = extend(plain, call(name, LENGTHS + np.minimum(i, accepted), real, 1))
        for row in np.flatnonzero(real):
            np.testing.assert_allclose(out[row, ..., i, :], expected[row, ..., 0, :], atol=2e-6)
        plain = after
    same(name, kept, plain, LENGTHS + accepted)


@every
def test_rows_are_gathered_repeated_and_left_out(name):
    index = np.array([2, 0, 2, 2])
    layer = start(name)
    done = LENGTHS[index]
    got = layer.rows(jnp.asarray(index))
    alone = start(name, 4, index)
    same(name, got, alone, done, index)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), layer).rows(jnp.asarray(index), axis=1)
    same(name, jax.tree.map(lambda x: x[1], stacked), alone, done, index)
    turn = call(name, done, [5, 2, 0, 1], 5, rows=index)
    (out, got), (expected, alone) = extend(got.grow(done, 17), turn), extend(alone.grow(done, 17), turn)
    for row, n in enumerate([5, 2, 0, 1]):
        np.testing.assert_allclose(out[row, ..., :n, :], expected[row, ..., :n, :], atol=2e-6)
    same(name, got, alone, done + np.array([5, 2, 0, 1]), index)


@every
def test_room_is_made_where_it_is_needed(name):
    layer = start(name)
    done = LENGTHS
    while not bool(jnp.any(layer.full(done))) and done.max() < 60:
        _, layer = extend(layer, call(name, done, np.ones(B), 1))
        done = done + 1
    assert bool(jnp.any(layer.full(done, 7))) or not bool(jnp.any(layer.full(done)))
    grown = layer.grow(done, 1)
    assert not bool(jnp.any(grown.full(done)))
    several = layer.grow_singly(done, 7)
    assert not bool(jnp.any(several.full(done, 7)))
    if grown is not layer:
        same(name, grown, layer.grow(done, 9), done)
        same(name, several, layer.grow(done, 9), done)


@struct.dataclass
class Recurrent:
    """A state of a recurrent layer."""

    h: jax.Array


def tree() -> Memory:
    """Two nodes: a stack of two policies' layers, a recurrent one and a ring; inside, dense layers of fewer units."""
    make = lambda name: jax.tree.map(lambda x: jnp.stack([x, x]), start(name))  # noqa: E731
    inside = Memory((start("dense"),), jnp.asarray(LENGTHS), {"newest": jnp.arange(3.0)})
    outside = (
        Stack(make("tova")),
        Stack(Recurrent(jnp.ones((2, 3, 4)))),
        (start("ring"), Recurrent(jnp.ones((3, 4)))),
    )
    return Memory(outside, jnp.asarray(LENGTHS) + 1, {"inside": inside, "x": jnp.arange(6.0).reshape(3, 2)})


def test_a_tree_of_memories_answers_as_its_layers_do():
    one = tree()
    assert len(memory.nodes(one)) == 2
    held, read = memory.use(one)
    np.testing.assert_allclose(held, [(2 * min(n, 10) + min(n + 1, 6) + n) / 4 for n in LENGTHS], rtol=1e-6)
    np.testing.assert_array_equal(read, held)
    np.testing.assert_array_equal(memory.full(one), [True, False, False])
    grown = memory.grow(one)
    assert not memory.full(grown).any()
    dense = grown.parts["inside"].layers[0]
    assert dense.k.shape[2] == 32 and grown.layers[0].states.k.shape == one.layers[0].states.k.shape
    few = memory.rows(grown, jnp.array([1, 1]))
    np.testing.assert_array_equal(few.parts["inside"].parts["newest"], [1, 1])
    np.testing.assert_array_equal(few.parts["x"], [[2, 3], [2, 3]])
    assert few.layers[1].states.h.shape == (2, 2, 4) and few.layers[2][1].h.shape == (2, 4)
    apart = memory.unstack(few)
    assert isinstance(apart.layers[0], tuple) and len(apart.layers[0]) == len(apart.layers[1]) == 2
    for a, b in zip(memory.use(apart), memory.use(few)):
        np.testing.assert_allclose(a, b)


@dataclasses.dataclass(frozen=True)
class Twice(type(BUDGETS["tova"])):
    """Reads prompts twice, and keeps everything of its last layer."""

    passes = 2

    def settle(self, layers, length_b):
        assert layers.k.shape[0] == 3
        return layers.replace(score=layers.score + jnp.arange(3.0)[:, None, None, None])


def test_policies_settle_all_their_layers_together():
    twice = Twice(budget=10)
    layer = start("tova").replace(policy=twice)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), layer)
    one = Memory((Stack(pair), start("dense"), (layer,)), jnp.asarray(LENGTHS))
    assert memory.passes(one) == 2 and memory.part(one) is None
    assert readings.once_more(one).reading == 1
    later = jax.tree.map(lambda x: x + 1, one)
    got = readings.settle(one, later)
    for i, score in enumerate((*got.layers[0].states.score, got.layers[2][0].score)):
        np.testing.assert_array_equal(score, layer.score + 1 + i)
    np.testing.assert_array_equal(got.layers[1].k, one.layers[1].k)
    np.testing.assert_array_equal(got.length, LENGTHS)


def test_every_layer_may_have_its_own_policy():
    text = "quest:budget=512;0=none;3=tova:budget=64,sinks=2"
    chosen = parse(text)
    quest, tova = parse("quest:budget=512"), parse("tova:budget=64,sinks=2")
    assert chosen == PerLayer(quest, ((0, None), (3, tova)))
    assert [policy_of(chosen, i) for i in range(5)] == [None, quest, quest, tova, quest]
    assert [policy_of(chosen, i, "sliding") for i in range(5)] == [None, None, None, tova, None]
    assert policy_of(quest, 7) == quest and policy_of(quest, 7, "sliding") is None and policy_of(None, 1) is None
    assert policies_of(chosen) == (quest, tova) and policies_of(None) == ()
    assert config.from_json(object, json.loads(json.dumps(config.to_json(chosen)))) == chosen
    with pytest.raises(AtomError, match="pairs of a layer"):
        PerLayer(None, ((1,),))
    with pytest.raises(AtomError, match="layer 1 sees a window only"):
        policy_of(PerLayer(None, ((1, quest),)), 1, "sliding")
    for wrong, says in (("none;x=tova:budget=4", "LAYER=POLICY"), ("none;1=tofa", "'tofa'"),
                        ("none;1=none;1=none", "different number")):  # fmt: skip
        with pytest.raises(AtomError, match=says):
            parse(wrong)


def test_expected_entries():
    assert [parse("tova:budget=64").expected(n) for n in (10, 100)] == [10, 64]
    assert parse("tova:ratio=0.25").expected(100) == 25 and parse("quest:budget=64").expected(64) == 68
    assert DMS(cr=4.0, window=16).expected(1000) == 266 and DMS(window=16).expected(10) == 10
