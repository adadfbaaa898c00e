"""KVCompose against its definition and against kvpress.

tests/golden/kvpress: what kvpress 0.5.5 (torch 2.13.0, transformers 5.2.0) keeps of 60 tokens, and the nats of the 12
after them, with the weights of tests/golden/hf_tiny, whose queries are 8 times as large (`benchmarks.press`).
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import atom_jax
from atom_jax.inference import continuation
from atom_jax.kvcache import memory, readings
from atom_jax.kvcache.kvcompose import KVCompose
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.models.registry import with_memory
from atom_jax.session import reading
from tests.kvcache import naive_policies as naive
from tests.kvcache.test_policies import SIZES, extend, later, layer, prompt

LENGTHS = np.array([20, 13, 5])


def read(p, lengths=LENGTHS):
    """The memory of three layers after both readings and what is settled, and the tensors of each."""
    first, again, seen = [], [], []
    empty = p.init(SIZES, 20, (0, 1, 2))
    for i in range(3):
        turn = lambda call, i=i: call.replace(q=jnp.roll(call.q, i, -1) * (1 + i), v=jnp.roll(call.v, i, -1))  # noqa: E731
        once, twice = turn(prompt(lengths, 20)), turn(later(lengths, 20, lengths)).replace(reading=1)
        _, state = extend(layer(empty, i), once)
        first.append(state)
        again.append(extend(state, twice)[1])
        seen.append((once, twice))
    stack = lambda states: Stack(jax.tree.map(lambda *x: jnp.stack(x), *states))  # noqa: E731
    one = Memory((stack(first),), jnp.asarray(lengths))
    assert memory.passes(one) == 2 and all(policy.shrinks for policy in memory.policies(one))
    settle = jax.jit(readings.settle)
    return settle(one, Memory((stack(again),), jnp.asarray(2 * lengths))), seen


def tensors_of(seen, row, n):
    """(q, k, v) of every layer over a row's prompt and its second reading, float64."""
    out = []
    for once, twice in seen:
        both = [
            [np.asarray(getattr(call, name), np.float64)[row][..., :n, :] for call in (once, twice)] for name in "qkv"
        ]
        out.append([np.concatenate(pair, axis=-2) for pair in both])
    return out


@pytest.mark.parametrize(
    "p",
    [
        KVCompose(budget=6),
        KVCompose(ratio=0.45, first=True),
        KVCompose(budget=4, structured=False, norms=True),
        KVCompose(ratio=0.3, structured=False),
    ],
)
def test_layers_keep_what_the_definition_keeps(p):
    settled, seen = read(p)
    pos = np.asarray(settled.layers[0].states.pos)
    lists = 3 if p.structured else 6
    for row, n in enumerate(LENGTHS):
        total = min(p.budget, n) * lists if p.budget else int(n * lists * p.ratio + 1e-9)
        expected = naive.kvcompose(p, tensors_of(seen, row, n), total)
        got = [[set(int(i) for i in head if i >= 0) for head in heads] for heads in pos[:, row]]
        assert got == expected
    assert p.first or int(settled.layers[0].states.n[0, 0].max()) < 20


def test_budgets_are_used_and_nested():
    sets = []
    for budget in (3, 6, 9):
        state = read(KVCompose(budget=budget))[0].layers[0].states
        # One entry stays in a layer that would get none.
        total = np.asarray(state.n[:, 0]).sum(0)
        assert total[0] == total[1] and 3 * budget <= total[0] <= 3 * budget + 2
        sets.append([set(int(i) for i in pos if i >= 0) for pos in np.asarray(state.pos)[:, 0].reshape(-1, 20)])
    assert all(a <= b for small, large in itertools.pairwise(sets) for a, b in zip(small, large))


def test_memory_is_smaller_after_the_prompt():
    settled, _ = read(KVCompose(budget=4))
    state = settled.layers[0].states
    grown = memory.grow(settled).layers[0].states
    assert state.k.shape[3] == 20 and grown.k.shape[3] == int(state.limit.max()) < 20
    np.testing.assert_array_equal(grown.n, state.n)
    np.testing.assert_array_equal((grown.pos >= 0).sum(-1), state.n)
    one = layer(grown)
    for i in range(6):
        _, one = extend(one, later(LENGTHS + i))
    np.testing.assert_array_equal(one.n, one.limit)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equal_to_kvpress(golden, family):
    io = load_file(golden / "kvpress" / "kvcompose.safetensors")
    lm = atom_jax.load(golden / "hf_tiny" / family)
    attn = lm.params["layers"]["attn"]
    attn = {**attn, "q": attn["q"] * 8}
    lm = dataclasses.replace(lm, params={**lm.params, "layers": {**lm.params["layers"], "attn": attn}})
    context, target = io[f"{family}.ids"][:60], io[f"{family}.ids"][60:]
    for name, structured in (("layers", True), ("heads", False)):
        for budget in (30, 12, 4):
            model = with_memory(lm, KVCompose(budget=budget, structured=structured, first=True))
            _, cache, _ = reading.read(model.params, context[None], np.array([60]), cfg=model.config)
            expected = io[f"{family}.{name}.{budget}.kept"]
            pos = np.asarray(cache.layers[0][0].states.pos)[:, 0]
            kept = (pos[..., None] == np.arange(60)).any(2)
            np.testing.assert_array_equal(kept, expected > 0)
            if structured:
                found = continuation.score(model, [context], [target])
                np.testing.assert_allclose(-found.logprobs.mean(), io[f"{family}.{name}.{budget}.nats"][0], atol=2e-5)
