"""A cache policy from outside the package, registered by one call: what leaves is merged into the entry after it."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.kvcache.budget import FAR, Budget
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.policies import POLICIES, parse, register
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM
from tests.kvcache.test_policies import LENGTHS, SIZES, extend, later, layer, prompt, tensors


@dataclasses.dataclass(frozen=True)
class Merge(Budget):
    """The oldest entry after the sinks and the one after it become one: the mean of keys and values, weighted by how
    many tokens each stands for, whose logarithm is the entry's bias."""

    name: ClassVar[str] = "merge"
    biased: ClassVar[bool] = True

    def gather(self, layer, entries, keep):
        return layer, self.merged(entries, (entries.pos >= 0) & ~keep)

    def absorb(self, layer, slot_bh, live_bh):
        gone = numbers(layer.pos) == jnp.where(live_bh, slot_bh, -1)[..., None]
        one = self.merged(layer.entries, gone)
        return layer.replace(k=one.k, v=one.v, bias=one.bias)

    def merged(self, entries, gone):
        """Entries in which the oldest that stays stands for those that are `gone`, bool [b, h, s], too."""
        later = jnp.where(gone | (entries.pos < self.sinks), FAR, entries.pos)
        into = (numbers(later) == jnp.argmin(later, axis=-1)[..., None]) & gone.any(-1, keepdims=True)
        share = jnp.where(gone | into, jnp.exp(entries.bias), 0.0)
        total = jnp.maximum(share.sum(-1), 1.0)[..., None]

        def put(x):
            mean = jnp.einsum("bhs,bhsk->bhk", share, x.astype(jnp.float32)) / total
            return jnp.where(into[..., None], mean[:, :, None].astype(x.dtype), x)

        bias = jnp.where(into, jnp.log(total), entries.bias)
        return entries.replace(k=put(entries.k), v=put(entries.v), bias=bias)


def numbers(x):
    """Of the entries, in the shape of x [b, h, s]."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)


@pytest.fixture(autouse=True, scope="module")
def registered():
    register(Merge)
    yield
    POLICIES.pop("merge")


POLICY = Merge(budget=8, sinks=2)


def test_entries_are_weighted_means_of_the_tokens_that_they_stand_for():
    _, state = extend(layer(POLICY.init(SIZES, 60, (0, 1, 2))), prompt())
    for i in range(6):
        _, state = extend(state, later(LENGTHS + i))
    _, k, v = tensors()
    for row, n in enumerate(LENGTHS + 6):
        pos = np.asarray(state.pos[row, 0])
        # The sinks, the newest, and one for all between.
        assert sorted(pos) == [0, 1, *range(n - 6, n)]
        at, weight = int(np.argmax(pos == n - 6)), n - 7
        np.testing.assert_allclose(np.exp(state.bias[row, 0, at]), weight, rtol=1e-5)
        np.testing.assert_allclose(state.k[row, 0, at], k[row, 0, 2 : n - 5].mean(0), atol=1e-5)
        np.testing.assert_allclose(state.v[row, 0, at], v[row, 0, 2 : n - 5].mean(0), atol=1e-5)
        assert np.count_nonzero(state.bias[row, 0]) == (weight > 1)


def test_tokens_that_are_alike_lose_nothing():
    def alike(call):
        middle = ((call.tokens.positions >= 2) & (call.tokens.positions < 35))[:, None, :, None]
        return call.replace(k=jnp.where(middle, 0.3, call.k), v=jnp.where(middle, -0.7, call.v))

    short = np.array([35, 35, 35])
    _, state = extend(layer(POLICY.init(SIZES, 60, (0, 1, 2))), alike(prompt(short)))
    _, dense = extend(DenseLayer.empty(3, 2, 60, 8, jnp.float32), alike(prompt(short)))
    for i in range(5):
        out, state = extend(state, later(short + i))
        expected, dense = extend(dense, later(short + i))
        np.testing.assert_allclose(out, expected, atol=1e-5)
    assert int(state.held(short).max()) == 8


@functools.cache
def lm_of(text):
    cfg = TransformerConfig(
        vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, max_length=400
    )
    tree = params.init(jax.random.key(1), registry.of(cfg).spec(cfg))
    tree["embed"] = tree["embed"] * 20
    return registry.with_memory(LM(cfg, tree, None), parse(text))


def make(text, rows, new=8, **how):
    return atom_jax.generate(lm_of(text), rows, new, stop_ids=(), keep_memory=True, **how)


def test_a_conversation():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n).tolist() for n in (30, 12)]
    more = [rng.integers(0, 50, n).tolist() for n in (3, 5)]
    made = []
    for text in ("none", "merge:budget=100", "merge:budget=8,sinks=2"):
        one = make(text, rows)
        two = make(text, more, after=one)
        made.append(one.ids + two.ids)
    np.testing.assert_array_equal(one.memory.use()[0], [8, 8])
    alone = make(text, 2 * rows[:1])
    assert alone.ids == 2 * one.ids[:1] and make(text, 2 * more[:1], after=alone).ids == 2 * two.ids[:1]
    dense, roomy, merged = made
    assert roomy == dense and merged != dense
