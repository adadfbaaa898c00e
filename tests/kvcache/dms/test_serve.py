"""The serving cache against the official implementation's numbers, and against the pass without a cache.

tests/golden/dms: two layers, window 8, from NVIDIA Model-Optimizer's experimental/dms (commit a2fbac7ba) on a CPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.inference.generate import generate
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache import paged, pool
from atom_jax.kvcache.dms import DMS
from atom_jax.models import layers, registry, transformer
from atom_jax.params import init
from atom_jax.session import reading
from atom_jax.typing import LM, AtomError, Batch
from tests.kvcache.dms import tiny


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def official(request, golden):
    """(configuration, parameters, reference numbers) of one variant."""
    folder = golden / "dms" / request.param
    cfg, params, _ = tiny.load(folder)
    cfg = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, page=4))
    return cfg, params, load_file(folder / "serve.safetensors")


@functools.partial(jax.jit, static_argnames="cfg")
def whole(params, batch, *, cfg):
    """Logits and decisions of the pass without a cache."""
    x, _, aux = transformer.hidden(params, batch, cfg=cfg)
    return transformer.logits(params, x, cfg=cfg), aux


@functools.partial(jax.jit, static_argnames="cfg")
def extend(params, batch, cache, *, cfg):
    """Logits [b, t, v] and the cache after these tokens."""
    out, cache = transformer.apply(params, batch, cfg=cfg, cache=cache)
    return out.logits, cache


def batch_of(ids, start=0, lengths=None):
    """Right-padded rows whose tokens stand at start, start + 1, ..."""
    ids = jnp.asarray(ids, jnp.int32)
    b, t = ids.shape
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
    real = jnp.arange(t)[None] < jnp.full((b, 1), t) if lengths is None else jnp.arange(t)[None] < lengths[:, None]
    return Batch(ids, start[:, None] + jnp.arange(t)[None], real.astype(jnp.int32))


def stacked(cache):
    """The layers of a cache, all of one kind."""
    return cache.layers[0][0].states


def held(cache, cfg):
    """Entries of every head, [l, b, h]."""
    return layers.ask(cfg.attentions, cache.layers, lambda layer: layer.held(cache.length))


def read(params, ids, cache, *, cfg, lengths=None):
    """`extend` with room made before it and trimmed after it."""
    cache = memory_lib.grow(cache, ids.shape[1])
    out, cache = extend(params, batch_of(ids, cache.length, lengths), cache, cfg=cfg)
    return out, memory_lib.grow(cache)


def read_in(params, ids, size, *, cfg):
    """Logits of all tokens and the cache, reading `size` at a time."""
    cache, out = transformer.init_cache(cfg, len(ids), 1), []
    for at in range(0, ids.shape[1], size):
        one, cache = read(params, ids[:, at : at + size], cache, cfg=cfg)
        out.append(one)
    return jnp.concatenate(out, axis=1), cache


@pytest.mark.parametrize("size", [40, 5, 7, 16])
def test_official_prompt(official, size):
    cfg, params, io = official
    out, cache = read_in(params, io["input_ids"], size, cfg=cfg)
    np.testing.assert_allclose(out, io["prefill_logits"], atol=3e-4)
    name = "prefill_occupancy" if size == 40 else f"prefill_occupancy_chunk{size}"
    np.testing.assert_array_equal(stacked(cache).pool.n, io[name])


def test_official_left_padding(official):
    cfg, params, io = official
    real = io["leftpad_attention_mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    batch = Batch(jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(positions), jnp.asarray(real))
    out, aux = whole(params, batch, cfg=cfg)
    np.testing.assert_allclose(out[real > 0], io["leftpad_logits"][real > 0], atol=3e-4)
    np.testing.assert_array_equal(aux["occupancy"], io["leftpad_occupancy"])


def test_official_decoding(official, monkeypatch):
    monkeypatch.setattr(paged, "AHEAD", 8)  # so that the memory has to grow
    cfg, params, io = official
    out, cache = read_in(params, io["input_ids"], 40, cfg=cfg)
    token, made, last = out[:, -1].argmax(-1), [], []
    for step in range(47):
        made.append(np.asarray(token))
        if bool(memory_lib.full(cache).any()):
            cache = memory_lib.grow(cache)
        out, cache = extend(params, batch_of(token[:, None], cache.length), cache, cfg=cfg)
        np.testing.assert_array_equal(stacked(cache).pool.n, io["decode_occupancy"][step])
        token = out[:, 0].argmax(-1)
        last.append(out[:, 0])
    made.append(np.asarray(token))
    np.testing.assert_array_equal(np.stack(made, axis=1), io["greedy_ids"])
    np.testing.assert_allclose(jnp.stack(last, axis=1), io["full_sequence_logits"][:, 40:], atol=3e-4)
    keys = projected_keys(params, batch_of(io["full_sequence_ids"]), cfg)
    for layer in range(2):
        for row in range(4):
            held = np.sort(entries(cache, layer, row), axis=0)
            kept = io["retained_mask_after_last_step"][layer].reshape(4, -1)[row] > 0
            expected = np.sort(keys[layer].reshape(4, -1, 16)[row][kept], axis=0)
            np.testing.assert_allclose(held, expected, atol=1e-4)


def projected_keys(params, batch, cfg):
    """Keys [l, b, h, t, k] of the pass without a cache."""
    run = jax.jit(
        lambda params: transformer.hidden(params, batch, cfg=cfg, probe=lambda p, heads, call: call.k)[2]["probe"]
    )
    return np.asarray(run(params))


def entries(cache, layer, row):
    """Keys [n, k] in the pages of a row."""
    p = jax.tree.map(lambda x: np.asarray(x[layer]), stacked(cache).pool)
    return np.concatenate([p.k[i][: p.filled[i]] for i in np.flatnonzero(p.owner == row)])


def test_official_whole_sequence(official):
    cfg, params, io = official
    out, _ = read_in(params, io["full_sequence_ids"], 87, cfg=cfg)
    np.testing.assert_allclose(out, io["full_sequence_logits"], atol=3e-4)


POLICIES = [
    DMS("observed", window=6, scale=1.0, offset=0.0, sinks=2, page=4),
    DMS("observed", window=5, scale=1.0, offset=0.0, per="layer", bias=True, page=8),
    DMS("adapter", window=6, scale=1.0, offset=0.0, beyond=8, sinks=3, page=4, rank=2),
    DMS("observed", window=6, scale=1.0, offset=0.0, per="mean", sinks=2, page=4),
    DMS("observed", window=6, scale=1.0, offset=0.0, shared=3, sinks=2, page=4),
]


def untrained(memory):
    """A model with random weights whose evictors evict about half of what they see."""
    cfg = transformer.TransformerConfig(
        vocab_size=48, d_model=32, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=48, max_length=4096,
        memory=memory,
    )  # fmt: skip
    params = init(jax.random.key(0), transformer.spec(cfg))
    learned = params["layers"]["attn"]["dms"]
    keys = jax.random.split(jax.random.key(1), len(learned))
    for key, name in zip(keys, sorted(learned)):
        if name != "norm":
            learned[name] = jax.random.normal(key, learned[name].shape)
    if memory.form == "observed":
        # Around the middle of what is observed.
        learned["observed"] *= jnp.array([1.0, -1.0, 0.1])[None, :, None]
    if memory.shared:
        learned["tell"] *= jnp.array([0.1, -0.1, 0.1, 0.1])[None, :, None, None]
    return cfg, params


def follow(params, ids, calls, *, cfg, unstacked):
    """Largest difference of logits from the pass without a cache, which is checked to evict, and the entries held in
    the end, by both. calls: for each call, how many tokens every row reads."""
    lengths = np.sum(calls, axis=0)
    expected, aux = whole(params, batch_of(ids, 0, lengths), cfg=cfg)
    real = np.arange(ids.shape[1])[None] < lengths[:, None]
    assert 0.2 < float(np.asarray(aux["evict"]).mean((0, 2))[real].mean()) < 0.8
    cache, at, worst = transformer.init_cache(cfg, len(ids), max(calls[0])), np.zeros(len(ids), np.int32), 0.0
    used = params
    for i, counts in enumerate(calls):
        counts = np.array(counts)
        index = np.minimum(at[:, None] + np.arange(counts.max())[None], ids.shape[1] - 1)
        part = np.take_along_axis(ids, index, axis=1)
        if (part.shape[1] > 1 and i) or bool(memory_lib.full(cache).any()):
            cache = memory_lib.grow(cache, 17)  # more than AHEAD: few sizes, so few compilations
        out, cache = extend(used, batch_of(part, at, counts), cache, cfg=cfg)
        for r, n in enumerate(counts):
            worst = max(worst, float(np.abs(out[r, :n] - expected[r, at[r] : at[r] + n]).max(initial=0.0)))
        at += counts
        if i == 0 and unstacked:
            cache, used = memory_lib.unstack(cache), transformer.decode_params(params, cfg, unroll=True)
            cache = memory_lib.grow(cache)
    return worst, held(cache, cfg), aux["occupancy"]


# Rows of different lengths; a row that waits; single tokens; later turns, one of them without anything for a row.
DECODE = [[1, 1, 1]] * 9 + [[1, 0, 1]] * 3 + [[1, 1, 1]] * 4
TURNS = [[37, 5, 22], *DECODE, [9, 4, 0], *DECODE[6:12], [9, 9, 1], [1, 1, 1], [1, 1, 1]]
PARTS = [[9, 5, 9], [9, 0, 9], [9, 0, 4], [9, 0, 0], [1, 0, 0], *DECODE[4:]]
CASES = {
    "observed-turns-apart": (POLICIES[0], TURNS, True),
    "observed-parts": (POLICIES[0], PARTS, False),
    "layer-turns": (POLICIES[1], TURNS, False),
    "adapter-parts": (POLICIES[2], PARTS, True),
    "shared-turns": (POLICIES[4], TURNS, False),
    "shared-parts-apart": (POLICIES[4], PARTS, True),
    "mean-parts": (POLICIES[3], [*PARTS[:5], [1, 1, 1]], False),
}


@pytest.mark.parametrize(("memory", "calls", "unstacked"), CASES.values(), ids=list(CASES))
def test_like_the_pass_without_a_cache(memory, calls, unstacked, monkeypatch):
    monkeypatch.setattr(paged, "AHEAD", 16)
    cfg, params = untrained(memory)
    ids = np.random.default_rng(0).integers(0, 48, (3, int(np.sum(calls, axis=0).max())))
    worst, held, expected = follow(params, ids, calls, cfg=cfg, unstacked=unstacked)
    assert worst < 1e-4
    np.testing.assert_array_equal(held, expected)
    assert int(held.sum()) < 0.9 * 2 * 2 * np.sum(calls)


@pytest.fixture(scope="module")
def lm():
    cfg, params = untrained(POLICIES[0])
    return LM(cfg, params, None)


@pytest.fixture
def parts(monkeypatch):
    """Sets the size of the parts in which prompts are read."""

    def to(size):
        monkeypatch.setattr(DMS, "part", size)
        reading.plan.cache_clear()

    yield to
    monkeypatch.undo()
    reading.plan.cache_clear()


def prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 48, n).tolist() for n in lengths]


def test_generation_does_not_depend_on_company_or_parts(lm, parts):
    rows = prompts(30, 3, 17)
    together = generate(lm, rows, max_new_tokens=20)
    alone = [generate(lm, [row], max_new_tokens=20).ids[0] for row in rows[1:]]
    assert together.ids[1:] == alone
    parts(8)
    assert generate(lm, rows, max_new_tokens=20).ids == together.ids
    ids = np.array([rows[0] + together.ids[0]])
    logits, _ = whole(lm.params, batch_of(ids), cfg=lm.config)
    assert logits[0, 29:-1].argmax(-1).tolist() == together.ids[0]


def test_a_later_turn_equals_the_whole_conversation(lm):
    first = generate(lm, prompts(30, 3), max_new_tokens=20, keep_memory=True)
    second = generate(lm, prompts(9, 25), max_new_tokens=12, after=first)
    rows = [a + b + c for a, b, c in zip(prompts(30, 3), first.ids, prompts(9, 25))]
    assert second.ids == generate(lm, rows, max_new_tokens=12).ids
    with pytest.raises(AtomError, match="continued already"):
        generate(lm, prompts(9, 25), after=first)


def test_generation_counts_what_is_held(lm):
    stats = generate(lm, prompts(60), max_new_tokens=20).stats
    cfg = dataclasses.replace(lm.config, memory=None)
    dense = generate(dataclasses.replace(lm, config=cfg), prompts(60), max_new_tokens=20).stats
    assert 0 < stats["kv_entries_peak"] < 0.9 * dense["kv_entries_peak"]
    assert 0 < stats["kv_reads"] < 0.9 * dense["kv_reads"]


def test_decoding_compiles_once(lm, monkeypatch):
    hidden, traced, family = transformer.hidden, [], registry.FAMILIES["llama"]
    counted = lambda *a, **k: traced.append(1) or hidden(*a, **k)  # noqa: E731
    monkeypatch.setattr(transformer, "hidden", counted)
    monkeypatch.setitem(registry.FAMILIES, "llama", dataclasses.replace(family, hidden=counted))
    fresh = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=4095))
    generate(fresh, prompts(20), max_new_tokens=4)
    assert len(traced) == 2
    generate(fresh, prompts(22), max_new_tokens=40)
    assert len(traced) == 2


def test_buffers_are_what_is_retained(parts):
    parts(512)
    cfg, params = untrained(DMS(window=16, bias=True))
    learned = params["layers"]["attn"]["dms"]
    # One head keeps everything, the other one only its window.
    learned["alpha"], learned["bias"] = learned["alpha"] * 0, jnp.tile(jnp.array([[0.0, 1.0]]), (2, 1))
    gen = generate(LM(cfg, params, None), prompts(2000), max_new_tokens=2)
    retained = 2 * (2001 + 17)
    assert gen.stats["kv_entries_peak"] == retained / 4
    assert gen.stats["kv_bytes"] < 1.25 * retained * 2 * 8 * 4


def test_sizes_of_pools():
    assert [pool.fine(n) for n in (1, 8, 9, 15, 16, 17, 31, 33, 100, 128, 129)] == [
        8, 8, 9, 15, 16, 18, 32, 36, 104, 128, 144,
    ]  # fmt: skip
