"""RazorAttention: heads that retrieve, and one entry for all that the others drop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import config, params
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.razor_attention import RazorAttention
from atom_jax.models import transformer
from atom_jax.nn.attention import Tokens
from atom_jax.transfer import retrieval_heads
from atom_jax.typing import LM, AtomError
from tests.kvcache import naive_policies as naive
from tests.kvcache.test_policies import LENGTHS, SIZES, extend, later, layer, prompt, tensors

POLICY = RazorAttention(budget=12, sinks=2, heads=((0, 1), (2, 0)))


def expected(p, length, retrieves, near):
    """By the definition, attention of the last of `length` tokens of every row."""
    q, k, v = (np.asarray(x, np.float64) for x in tensors())
    return [naive.razor_attention(p, q[r, ..., :n, :], k[r, :, :n], v[r, :, :n], retrieves, near)
            for r, n in enumerate(length)]  # fmt: skip


def test_tokens_see_what_the_definition_says():
    _, state = extend(layer(POLICY.init(SIZES, 60, (0, 1, 2))), prompt())
    for i in range(10):
        out, state = extend(state, later(LENGTHS + i))
        want = expected(POLICY, LENGTHS + i + 1, (False, True), 9)
        np.testing.assert_allclose(out[..., 0, :], want, atol=2e-5)
        np.testing.assert_array_equal(state.held(LENGTHS), [[min(n + i + 1, 12), n + i + 1] for n in LENGTHS])
    # A turn is stored whole, and leaves token by token.
    done = LENGTHS + 10
    _, state = extend(state.grow(done, 4), later(done, 4, [4, 0, 3]))
    done = done + np.array([4, 0, 3])
    for i in range(5):
        out, state = extend(state, later(done + i))
    np.testing.assert_allclose(out[..., 0, :], expected(POLICY, done + 5, (False, True), 9), atol=2e-5)


def test_a_share_of_the_prompt_but_at_least_so_much():
    p = RazorAttention(ratio=0.25, sinks=1, least=4)
    _, state = extend(layer(p.init(SIZES, 60, (0, 1, 2))), prompt())
    np.testing.assert_array_equal(state.held(LENGTHS), np.repeat([[12], [7], [6]], 2, 1))
    whole = RazorAttention(ratio=1.0, sinks=1, least=1)
    _, state = extend(layer(whole.init(SIZES, 60, (0, 1, 2))), prompt())
    np.testing.assert_array_equal(state.held(LENGTHS), np.repeat(LENGTHS[:, None], 2, 1))


def test_equal_tokens_between_cost_nothing():
    def alike(call):
        middle = ((call.tokens.positions >= 2) & (call.tokens.positions < 35))[:, None, :, None]
        return call.replace(k=jnp.where(middle, 0.3, call.k), v=jnp.where(middle, -0.7, call.v))

    p = dataclasses.replace(POLICY, heads=())
    _, state = extend(layer(p.init(SIZES, 60, (0, 1, 2))), alike(prompt(np.array([40, 40, 40]))))
    _, dense = extend(DenseLayer.empty(3, 2, 60, 8, jnp.float32), alike(prompt(np.array([40, 40, 40]))))
    for i in range(4):
        out, state = extend(state, later(np.full(3, 40) + i))
        want, dense = extend(dense, later(np.full(3, 40) + i))
        np.testing.assert_allclose(out, want, atol=2e-6)
    assert int(state.held(LENGTHS).max()) == 12


def test_means_stay_exact_in_half_precision():
    """A running mean in bfloat16 would no longer move after some hundred tokens."""
    p = RazorAttention(budget=4, sinks=1)
    state = layer(p.init(SIZES._replace(b=1, dtype=jnp.bfloat16), 8, (0, 1, 2)))
    rng, step = np.random.default_rng(0), jax.jit(lambda state, call: state.extend(call)[1])
    keys = rng.normal(size=(600, 8)).astype(np.float32) + np.linspace(0, 4, 600, dtype=np.float32)[:, None]
    for i, k in enumerate(keys):
        kv = jnp.asarray(np.broadcast_to(k, (1, 2, 1, 8)), jnp.bfloat16)
        q = jnp.zeros((1, 2, 2, 1, 8), jnp.bfloat16)
        at = Tokens(jnp.full((1, 1), i), jnp.ones((1, 1), jnp.int32))
        state = step(state, Call(q, kv, kv, at, jnp.full(1, i)))
    middle = np.asarray(jnp.asarray(keys[1:598], jnp.bfloat16), np.float64).mean(0)
    place = int(np.argmax(np.asarray(state.pos)[0, 0] == 1))
    np.testing.assert_allclose(np.asarray(state.k, np.float32)[0, 0, place], middle, rtol=1e-2)
    np.testing.assert_allclose(state.bias[0, 0, place], np.log(597), rtol=1e-4)


def test_heads_that_repeat_and_that_induce():
    """One head attends to where the token stood before, one to what followed it, one to nothing in particular."""
    period, n = 12, 48
    ids = np.tile(np.random.default_rng(0).permutation(32)[:period], n // period)
    one = np.eye(32, dtype=np.float32)
    before = np.concatenate([one[ids[-1:]] * 0, one[ids[:-1]]])
    q = np.stack([one[ids] * 500, one[ids] * 0])[None, None]
    at = Tokens(jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))
    for keys, wanted in ((one[ids], "echo"), (before, "induction")):
        k = jnp.asarray(keys[None, None])
        call = Call(jnp.asarray(q), k, k, at, jnp.zeros(1, jnp.int32))
        found = dict(zip(("echo", "induction"), np.asarray(retrieval_heads.scores(call, period))[:, 0]))
        other = "induction" if wanted == "echo" else "echo"
        # The token itself is one of those that attention goes to.
        assert found[wanted][0] > 0.5 and found[other][0] < 1e-3
        assert found[wanted][1] < 0.2


def test_heads_are_found_in_a_model_and_written_down(tmp_path):
    cfg = transformer.TransformerConfig(
        vocab_size=48, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_length=512
    )
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), None)
    heads = retrieval_heads.find(lm, period=16, echo=0.05, induction=0.2)
    assert 1 <= len(heads) <= 4 and all(0 <= i < 3 and 0 <= j < 2 for i, j in heads)
    assert heads == tuple(sorted(set(heads)))
    policy = RazorAttention(ratio=0.2, heads=heads)
    file = tmp_path / "razor.json"
    file.write_text(json.dumps(config.to_json(policy)))
    assert parse(str(file)) == policy
    (tmp_path / "no.json").write_text("[")
    for name, says in (("no.json", "not valid JSON"), ("none.json", "cannot be read")):
        with pytest.raises(AtomError, match=says):
            parse(str(tmp_path / name))
    with pytest.raises(AtomError, match="sinks"):
        RazorAttention(budget=5, sinks=4)
