"""Decisions that are revised: against themselves written down one entry at a time, and what becomes of entries."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache import paged
from atom_jax.kvcache.dms import DMS, Revised
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.policy import PerLayer
from atom_jax.models import registry, transformer
from atom_jax.nn.attention import Tokens
from atom_jax.params import init
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError

B, H, G, K, T = 2, 2, 2, 8, 90
EVERY = 8
PLAIN = Revised(window=5, page=4, sinks=2, every=EVERY, share=0.6)
LEARNED = Revised("adapter", window=3, page=4, sinks=1, every=EVERY, share=0.5, decay=0.25, scale=1.0, offset=0.0)
# Shorter than the window, so that a key leaves for good between two looks.
OFTEN = dataclasses.replace(PLAIN, every=3, window=9, share=0.7)
extend = jax.jit(lambda layer, call: layer.extend(call))


@functools.cache
def tensors():
    """q, k, v and decisions of texts."""
    rng = np.random.default_rng(0)
    shapes = ((B, H, G, T, K), (B, H, T, K), (B, H, T, K), (B, H, T))
    return tuple(1.5 * rng.normal(size=s).astype(np.float32) for s in shapes)


def call(arrays, done, counts, t, fresh=False):
    """The next tokens of all rows, which have `done`: t columns, of which `counts` are real."""
    done, counts = np.asarray(done, np.int32), np.asarray(counts)
    at = np.minimum(done[:, None] + np.arange(t, dtype=np.int32)[None], arrays[0].shape[3] - 1)

    def take(x, axis):
        shape = (len(at), *[1] * (axis - 1), t, *[1] * (x.ndim - axis - 1))
        return np.take_along_axis(x, at.reshape(shape), axis)

    q, k, v, said = (take(x, axis) for x, axis in zip(arrays, (3, 2, 2, 2)))
    real = (np.arange(t)[None] < counts[:, None]).astype(np.int32)
    tokens = Tokens(jnp.asarray(at), jnp.asarray(real))
    learned = {"observed": jnp.ones((3, k.shape[1])) * jnp.array([[1.0], [-1.0], [0.1]])}
    said = jnp.asarray(said)
    return Call(*map(jnp.asarray, (q, k, v)), tokens, jnp.asarray(done), said=said, learned=learned, fresh=fresh)


def read(policy, calls, arrays=None):
    """Outputs [b, h, g, t, k] of texts that are read in these calls (how many tokens of every row), the layer, and
    the entries that every head held after each call."""
    arrays = tensors() if arrays is None else arrays
    b, h, g, _, size = arrays[0].shape
    layer = jax.tree.map(lambda x: x[0], policy.init(Sizes(1, b, h, g, size, jnp.float32), max(calls[0]), (0,)))
    out, done, held = np.zeros_like(arrays[0]), np.zeros(b, np.int32), []
    for i, counts in enumerate(calls):
        layer = layer.grow(done, max(counts))
        got, layer = extend(layer, call(arrays, done, counts, max(counts), i == 0))
        for row, n in enumerate(counts):
            out[row, :, :, done[row] : done[row] + n] = got[row, :, :, :n]
        done = done + np.array(counts, np.int32)
        held.append(np.asarray(layer.held(done)))
    return out, layer, np.array(held)


def naive(policy, row, head, t, arrays=None):
    """Outputs [g, t, k] of one head, and which positions it holds after each of t tokens."""
    q, k, v, said = (x[row, head].astype(float) for x in (tensors() if arrays is None else arrays))
    got, due, held, outs, over = {}, {}, [], [], []
    for now in range(t):
        if now and now % policy.every == 0:
            judged = [p for p in held if policy.sinks <= p < now - policy.every - policy.window]
            held = [p for p in held if p not in judged or got[p] >= policy.share * due[p]]
            got, due = ({p: policy.decay * x for p, x in account.items()} for account in (got, due))
        last = now - policy.window - 1
        if policy.form != "all" and last >= policy.sinks and said[last + 1] > 0:
            held = [p for p in held if p != last]
        held = [*held, now]
        scores = np.einsum("gk,pk->gp", q[:, now], k[held]) / math.sqrt(K)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        outs.append(weights @ v[held])
        for p, w in zip(held, weights.sum(0)):
            if now - p > policy.window:
                got[p], due[p] = got.get(p, 0.0) + w, due.get(p, 0.0) + len(q) / len(held)
        over.append(held)
    return np.stack(outs, axis=1), over


WAYS = {
    "at once": [[T, 61]],
    "token by token": [[1, 1]] * 61 + [[1, 0]] * (T - 61),
    "parts": [[30, 7], [11, 20], [1, 1], [1, 0], [8, 8], [1, 1], [38, 24]],
}


@pytest.mark.parametrize("policy", [PLAIN, LEARNED, OFTEN], ids=["all", "adapter", "often"])
@pytest.mark.parametrize("way", WAYS)
def test_like_one_entry_at_a_time(policy, way):
    """Ragged rows, in one call, in later turns, and token by token."""
    out, _, held = read(policy, WAYS[way])
    done = np.cumsum(WAYS[way], axis=0)
    some = 0
    for row, t in enumerate((T, 61)):
        for head in range(H):
            expected, over = naive(policy, row, head, t)
            np.testing.assert_allclose(out[row, head, :, :t], expected, atol=2e-5)
            assert held[:, row, head].tolist() == [len(over[n - 1]) for n in done[:, row]]
            some += t - len(over[-1])
    assert some > 40


@pytest.mark.parametrize("form", ["adapter", "observed", "separators"])
def test_without_a_share_it_is_what_it_revises(form):
    dms = DMS(form, window=5, page=4, scale=1.0, offset=0.0, sinks=1, separators=(1, 3))
    for calls in (WAYS["at once"], WAYS["parts"]):
        (out, _, held), (expected, _, kept) = (read(p, calls) for p in (Revised.of(dms, every=8, share=0.0), dms))
        np.testing.assert_allclose(out, expected, atol=2e-5)
        np.testing.assert_array_equal(held, kept)


def positions(layer):
    """Those that one row with one head holds."""
    pool = layer.pool
    return sorted(
        np.asarray(pool.notes.pos)[np.asarray(pool.there) & (np.asarray(pool.owner) == 0)[:, None]].tolist()
    )


@pytest.mark.parametrize("way", [[[1]] * 32, [[32]], [[11], [21]]], ids=["token by token", "at once", "two turns"])
def test_what_is_no_longer_attended_to_leaves_at_the_next_look(way):
    """Two keys that all queries attend to, the first of them until token 16."""
    q, k, v, said = (
        np.zeros(shape, np.float32) for shape in ((1, 1, 1, 48, K), (1, 1, 48, K), (1, 1, 48, K), (1, 1, 48))
    )
    k[0, 0, 2, 0], k[0, 0, 3, 1] = 8.0, 8.0
    q[..., :16, 0], q[..., 1] = 3.0, 3.0
    held = {}
    for policy in (Revised(window=2, page=4, sinks=0, every=8, decay=decay) for decay in (0.0, 0.9)):
        _, layer, counts = read(policy, way, (q, k, v, said))
        held[policy.decay] = positions(layer)
        if len(way) == 32:
            # Token 16 looks at those before 6, token 24 at those before 14.
            assert counts[14:17, 0, 0].tolist() == [15, 16, 13]
            assert counts[22:25, 0, 0].tolist() == [19, 20, 12 if policy.decay == 0 else 13]
    assert held[0.0] == [3, *range(14, 32)]
    assert held[0.9] == [2, 3, *range(14, 32)]


def test_held_entries_stop_growing_where_attention_is_local():
    t, calls = 400, [[50]] * 8
    angle = np.arange(t)[:, None] * np.array([0.3, 0.5, 0.9, 1.3])
    turned = 3.0 * np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)[None, None]
    arrays = (turned[None], turned, turned, np.zeros((1, 1, t), np.float32))
    local = Revised(window=10, page=4, sinks=2, every=16, share=0.1)
    _, layer, held = read(local, calls, arrays)
    assert held.max() <= 2 + 11 + 2 * 16 and abs(int(held[-1, 0, 0]) - int(held[2, 0, 0])) <= 16
    assert int(layer.pool.used) == -(-int(held[-1, 0, 0]) // 4)
    assert layer.trim().k.shape[0] <= paged.fine(-(-(int(held[-1, 0, 0]) + paged.AHEAD) // 4))
    _, everything, held = read(dataclasses.replace(local, share=0.0), calls, arrays)
    assert held[:, 0, 0].tolist() == list(range(50, 401, 50)) and everything.pool.used == 100


@pytest.fixture(scope="module")
def lm():
    """A model with evictors."""
    cfg = transformer.TransformerConfig(
        vocab_size=48, d_model=32, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=48, max_length=4096,
        memory=DMS("observed", window=6, scale=1.0, offset=0.0, shared=2, sinks=2, page=4),
    )  # fmt: skip
    params = init(jax.random.key(0), transformer.spec(cfg))
    learned = params["layers"]["attn"]["dms"]
    keys = jax.random.split(jax.random.key(1), len(learned))
    for key, name in zip(keys, sorted(learned)):
        if name != "norm":
            learned[name] = jax.random.normal(key, learned[name].shape)
    return LM(cfg, params, None)


def prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 48, n).tolist() for n in lengths]


def test_evictors_that_a_model_has_learned_are_revised(lm, tmp_path):
    revised = registry.with_memory(lm, Revised.of(lm.config.memory, every=8, share=0.9))
    jax.tree.map(np.testing.assert_array_equal, revised.params, lm.params)
    rows = prompts(120, 7, 33)
    stats = [atom_jax.generate(one, rows, 20).stats for one in (lm, revised)]
    assert stats[1]["kv_entries_peak"] < 0.9 * stats[0]["kv_entries_peak"]
    atom_jax.save_hf(revised, tmp_path)
    loaded = atom_jax.load(tmp_path)
    assert loaded.config.memory == lm.config.memory
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)


def test_evictors_of_a_model_are_named_in_a_text(lm, tmp_path):
    atom_jax.save_hf(lm, tmp_path)
    loaded = atom_jax.load(tmp_path, memory="revised:form=model,every=8,share=0.9")
    revised = registry.with_memory(lm, Revised.of(lm.config.memory, every=8, share=0.9))
    assert loaded.config.memory == revised.config.memory
    assert atom_jax.generate(loaded, prompts(50), 20).ids == atom_jax.generate(revised, prompts(50), 20).ids
    again = registry.with_memory(revised, parse("revised:form=model,every=4;1=none"))
    assert again.config.memory == PerLayer(Revised.of(lm.config.memory, every=4), ((1, None),))


def test_only_a_model_with_evictors_has_its_own(lm):
    own = parse("revised:form=model")
    for text in ("none", "revised", "h2o:budget=9"):
        with pytest.raises(AtomError, match="with learned evictors"):
            registry.with_memory(registry.with_memory(lm, parse(text)), own)
    with pytest.raises(AtomError, match="model that is there"):
        transformer.spec(dataclasses.replace(lm.config, memory=own))
    with pytest.raises(AtomError, match="have a window of their own"):
        parse("revised:form=model,window=4")


def test_a_row_and_its_later_turns_are_what_they_are_alone(lm):
    revised = registry.with_memory(lm, Revised.of(lm.config.memory, every=8, share=0.9))
    rows, more = prompts(30, 3, 17), prompts(9, 25, 1)
    first = atom_jax.generate(revised, rows, 20, keep_memory=True)
    second = atom_jax.generate(revised, more, 12, after=first)
    assert atom_jax.generate(revised, rows[1:2], 20).ids == first.ids[1:2]
    whole = [a + b + c for a, b, c in zip(rows, first.ids, more)]
    assert atom_jax.generate(revised, whole, 12).ids == second.ids


def test_memory_shrinks_with_what_is_held(lm):
    """Buffers of a long text that is read in parts."""
    revised = registry.with_memory(lm, Revised.of(lm.config.memory, every=16, share=0.9))
    sessions = [Session.prefill(one, prompts(2000)) for one in (revised, lm)]
    assert sessions[0].use()[0] < 0.5 * sessions[1].use()[0] and sessions[0].nbytes < 0.5 * sessions[1].nbytes
    assert not memory_lib.full(Session.prefill(revised, prompts(40)).memory).any()


def test_bad_settings():
    for text, says in (
        ("every=0", "every"),
        ("share=2", "share"),
        ("decay=-1", "decay"),
        ("form=some", "all, model, borrowed"),
    ):
        with pytest.raises(AtomError, match=says):
            parse(f"revised:{text}")
    with pytest.raises(AtomError, match="form"):
        parse("dms:form=all")
