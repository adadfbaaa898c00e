"""Recurrent memory transformers against a plain loop over segments, and what must hold of any cut of a text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import atom_jax
from atom_jax import params, sharding
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.tova import TOVA
from atom_jax.models import registry, rmt, transformer
from atom_jax.models.lora import LoRA
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import Tokens
from atom_jax.nn.norm import rms_norm
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError, Batch

MAIN = TransformerConfig(
    family="qwen3", vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    layer_types=("sliding", "full"), sliding_window=6, max_length=64,
)  # fmt: skip
CFG = rmt.RMTConfig(main=MAIN, memory_tokens=3, segment=8, max_length=512)
T = 28


@functools.cache
def weights(cfg=CFG):
    return params.init(jax.random.key(1), rmt.spec(cfg))


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)


@functools.partial(jax.jit, static_argnames="cfg")
def hidden(p, batch, cache=None, *, cfg=CFG):
    return rmt.hidden(p, batch, cfg=cfg, cache=cache)


def rows(*texts, t=T, left=False):
    """A batch of texts, padded."""
    ids, real = np.zeros((len(texts), t), np.int32), np.zeros((len(texts), t), np.int32)
    for row, one in enumerate(texts):
        at = slice(t - len(one), t) if left else slice(0, len(one))
        ids[row, at], real[row, at] = one, 1
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    return Batch(*map(jnp.asarray, (ids, positions.astype(np.int32), real)))


def loop(p, ids, cfg=CFG):
    """States [t, d] of one text, in as many calls of the transformer as it has segments."""
    memory, found = p["memory"], []
    for at in range(0, len(ids), cfg.segment):
        here = p["main"]["embed"][ids[at : at + cfg.segment]]
        y = segment(p, jnp.concatenate([memory, here, memory]), cfg)
        found.append(y[cfg.memory_tokens : -cfg.memory_tokens])
        memory = y[-cfg.memory_tokens :]
    return jnp.concatenate(found)


@functools.partial(jax.jit, static_argnames="cfg")
def segment(p, x_td, cfg):
    places = Tokens(jnp.arange(len(x_td))[None], jnp.ones((1, len(x_td)), jnp.int32))
    y, _, _ = transformer.blocks(p["main"]["layers"], x_td[None], places, cfg=cfg.main)
    return rms_norm(y, p["main"]["norm"], cfg.main.norm_eps)[0]


def test_rows_are_a_loop_over_segments():
    p, texts = weights(), [text(T), text(16, 1), text(5, 2)]
    for left in (False, True):
        batch = rows(*texts, left=left)
        y, cache, aux = hidden(p, batch)
        assert cache is None and aux["lost"] == 0
        np.testing.assert_array_equal(aux["metrics"]["lost_tokens"], [0, T + 16 + 5])
        for row, one in enumerate(texts):
            np.testing.assert_allclose(y[row][np.asarray(batch.segments[row]) > 0], loop(p, one), atol=1e-5)


def test_documents_of_a_row_do_not_know_of_each_other():
    p, lengths = weights(), (3, 8, 9, 1, 2)
    texts = [text(n, n) for n in lengths]
    ids, segments = np.zeros(T, np.int32), np.zeros(T, np.int32)
    # Padding before, between and behind.
    starts = (1, 5, 13, 22, 24)
    for number, (at, one) in enumerate(zip(starts, texts)):
        ids[at : at + len(one)], segments[at : at + len(one)] = one, number + 1
    batch = Batch(jnp.asarray(ids)[None], jnp.zeros((1, T), jnp.int32), jnp.asarray(segments)[None])
    y, _, aux = hidden(p, batch)
    assert aux["lost"] == 0
    for at, one in zip(starts, texts):
        np.testing.assert_allclose(y[0, at : at + len(one)], loop(p, one), atol=1e-5)
    few, _, aux = hidden(p, batch, cfg=dataclasses.replace(CFG, documents=1))
    # There is room for four segments, of which the documents take 1, 1, 2, 1 and 1.
    assert aux["lost"] == 3 and not np.asarray(few[0, np.array([22, 24, 25])]).any()
    np.testing.assert_allclose(few[0, :22], y[0, :22], atol=1e-5)
    assert registry.of(CFG).roomier(dataclasses.replace(CFG, documents=4)) == CFG


def test_a_text_within_a_segment_is_read_as_by_the_transformer():
    cfg, ids = dataclasses.replace(CFG, memory_tokens=0, segment=64), rows(text(T), text(17, 1))
    p = weights(cfg)
    assert params.flatten(p).keys() == {f"main/{name}" for name in params.flatten(transformer.spec(MAIN))}
    theirs = jax.jit(functools.partial(transformer.hidden, cfg=MAIN))(p["main"], ids)[0]
    np.testing.assert_allclose(hidden(p, ids, cfg=cfg)[0][0], theirs[0], atol=1e-5)
    y, cache, _ = hidden(p, ids, rmt.init_cache(cfg, 2, T), cfg=cfg)
    np.testing.assert_allclose(y[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(y[1, :17], theirs[1, :17], atol=1e-5)
    np.testing.assert_array_equal(cache.length, [T, 17])


@pytest.mark.parametrize("parts", [(T,), (9, 9, 9, 1), (1,) * T], ids=["whole", "parts", "singly"])
def test_any_cut_of_texts_gives_the_same(parts):
    p, texts = weights(), [text(T), text(19, 1), text(8, 2)]
    cache, at, found = rmt.init_cache(CFG, 3, T), np.zeros(3, int), [[], [], []]
    sizes = jax.tree.map(jnp.shape, cache)
    for number, n in enumerate(parts):
        # Rows come to be in different places: the second waits in one call, the third reads one token less in each.
        counts = np.array([n, 0 if number == 1 else n, max(n - 1, 1)])
        counts = np.minimum(counts, [len(one) - i for one, i in zip(texts, at)])
        batch = rows(*(one[i : i + k] for one, i, k in zip(texts, at, counts)), t=n)
        y, cache, aux = hidden(p, batch, cache)
        assert not aux
        for row, k in enumerate(counts):
            found[row].append(y[row, :k])
        at += counts
    np.testing.assert_array_equal(cache.length, at)
    assert jax.tree.map(jnp.shape, cache.replace(fresh=True)) == sizes
    for one, n, mine in zip(texts, at, found):
        np.testing.assert_allclose(jnp.concatenate(mine), loop(p, one[:n]), atol=1e-5)


def test_what_is_kept_does_not_grow():
    small, large = (rmt.init_cache(CFG, 1, n) for n in (1, 500))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)
    lm = LM(CFG, weights(), None)
    session = Session.prefill(lm, [text(9).tolist()])
    later = session.fork().extend([text(300).tolist()])
    assert later.nbytes == session.nbytes and later.length == [309]
    # Three memory tokens, and those of the segment.
    assert [s.use()[0][0] for s in (session, later)] == [3 + 1, 3 + 5]
    assert not np.asarray(memory_lib.full(later.memory, 1000)).any()


def test_rows_come_and_go():
    p, texts = weights(), [text(11), text(24, 1), text(6, 2)]
    _, cache, _ = hidden(p, rows(*texts), rmt.init_cache(CFG, 3, T))
    _, other, _ = hidden(p, rows(text(17, 3)), rmt.init_cache(CFG, 1, T))
    chosen = memory_lib.rows(memory_lib.put(cache, np.array([0]), other), jnp.array([2, 0, 1]))
    y, cache, _ = hidden(p, rows(*(text(7, n) for n in range(5, 8)), t=7), chosen)
    assert cache.length.tolist() == [13, 24, 31]
    for row, before in enumerate((texts[2], text(17, 3), texts[1])):
        np.testing.assert_allclose(y[row], loop(p, np.append(before, text(7, row + 5)))[-7:], atol=1e-5)


def test_drafts_are_tried_together():
    lm = LM(CFG, weights(), None)
    session = Session.prefill(lm, [text(13).tolist(), text(6, 1).tolist()])
    draft = np.stack([text(5, 3), text(5, 4)])
    tried = session.verify(draft)
    whole = hidden(lm.params, rows(*(np.append(text(n, s), d) for n, s, d in ((13, 0, draft[0]), (6, 1, draft[1])))))[
        0
    ]
    for row, n in enumerate((13, 6)):
        said = rmt.logits(lm.params, whole[row : row + 1, n - 1 : n + 5], cfg=CFG)[0]
        np.testing.assert_allclose(tried.logits[row], said, atol=1e-4)
    kept = tried.accept([4, 1])
    assert kept.length.tolist() == [17, 7]
    np.testing.assert_allclose(kept.logits, [tried.logits[0, 4], tried.logits[1, 1]], atol=1e-4)


def test_gradients_go_through_all_segments():
    p, batch = weights(), rows(text(T))

    def last(p, states):
        return jnp.sum(jnp.sin(states(p)))

    mine = jax.jit(jax.grad(lambda p: last(p, lambda p: rmt.hidden(p, batch, cfg=CFG)[0][0, 24:])))(p)
    theirs = jax.grad(lambda p: last(p, lambda p: loop(p, text(T))[24:]))(p)
    assert np.abs(np.asarray(mine["memory"])).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), mine, theirs)
    again = dataclasses.replace(CFG, remat=True)
    remat = jax.jit(jax.grad(lambda p: last(p, lambda p: rmt.hidden(p, batch, cfg=again)[0][0, 24:])))(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), remat, mine)


def test_on_a_mesh_it_is_the_same():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    p, batch = weights(), rows(*(text(n, n) for n in (T, 9, 20, 3)))

    def loss(p, batch):
        return jnp.mean(jnp.sin(rmt.hidden(p, batch, cfg=CFG)[0]) * (batch.segments > 0)[:, :, None])

    alone = jax.jit(jax.value_and_grad(loss))(p, batch)
    with jax.set_mesh(mesh):
        placed = jax.device_put(p, sharding.shardings(rmt.spec(CFG), mesh))
        spread = jax.device_put(batch, sharding.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(loss))(placed, spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, alone)


def test_memory_tells_what_the_last_segment_does_not():
    """The first token of three segments is asked for at the end: one of eight."""
    main = dataclasses.replace(MAIN, vocab_size=16, layer_types=())
    found = {}
    for m in (2, 0):
        cfg = rmt.RMTConfig(main=main, memory_tokens=m, segment=6, documents=1)
        p, optimiser = weights(cfg), optax.adam(3e-3)

        def loss(p, key, cfg=cfg):
            ids = jax.random.randint(key, (32, 18), 8, 15).at[:, 0].set(jax.random.randint(key, (32,), 0, 8))
            ids = ids.at[:, -1].set(15)
            places = jnp.broadcast_to(jnp.arange(18)[None], ids.shape)
            y, _, _ = rmt.hidden(p, Batch(ids, places, jnp.ones_like(ids)), cfg=cfg)
            said = rmt.logits(p, y[:, -1:], cfg=cfg)[:, 0]
            right = jnp.mean(said.argmax(-1) == ids[:, 0])
            return optax.softmax_cross_entropy_with_integer_labels(said, ids[:, 0]).mean(), right

        def step(carry, key, loss=loss, optimiser=optimiser):
            p, state = carry
            grads, right = jax.grad(loss, has_aux=True)(p, key)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(p, updates), state), right

        keys = jax.random.split(jax.random.key(2), 300 if m else 30)
        _, right = jax.jit(functools.partial(jax.lax.scan, step))((p, optimiser.init(p)), keys)
        found[m] = float(right[-20:].mean())
    assert found[2] > 0.95 and found[0] < 0.4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"main": dataclasses.replace(MAIN, lora=LoRA())}, "main.lora"),
        ({"main": CFG}, "main: expected TransformerConfig"),
        ({"segment": 60}, "segment: 60 tokens between two times 3 memory_tokens take 66 places"),
        ({"segment": 0}, "segment"),
        ({"memory_tokens": -1}, "memory_tokens"),
        ({"documents": 0}, "documents"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_impossible_configurations_are_refused(change, words):
    with pytest.raises(AtomError, match=words):
        dataclasses.replace(CFG, **change)


def test_cache_policies_are_refused():
    policy, lm = TOVA(budget=8), LM(CFG, weights(), None)
    with pytest.raises(AtomError, match="memory: tova is for layers that see everything"):
        registry.with_memory(lm, policy)
    with pytest.raises(AtomError, match="memory: tova is for layers that see everything"):
        rmt.spec(dataclasses.replace(CFG, main=dataclasses.replace(MAIN, memory=policy)))


def test_text_is_made_across_segments():
    lm = LM(CFG, weights(), None)
    made = atom_jax.generate(lm, [text(7).tolist(), text(12, 1).tolist()], 20, stop_ids=())
    for prompt, ids in zip((text(7), text(12, 1)), made.ids):
        whole = np.append(prompt, ids)
        said = rmt.logits(lm.params, loop(lm.params, whole)[None], cfg=CFG)[0, len(prompt) - 1 : -1]
        assert (said.max(-1) - np.take_along_axis(said, np.array(ids)[:, None], axis=1)[:, 0]).max() < 1e-4
