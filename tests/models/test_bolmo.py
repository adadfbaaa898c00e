"""The tiny Bolmo against the official code's numbers, and what must hold for any."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.chunking.rules import lookahead
from atom_jax.chunking.types import Seen
from atom_jax.models import bolmo, transformer
from atom_jax.models.bolmo import BolmoConfig, forward
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import Tokens
from atom_jax.typing import LM, AtomError, Suffix
from tests.models.tiny_bolmo import NAMES, batch, ids_of, model, numbers, texts


def roomy(**changes):
    return dataclasses.replace(model().config, capacity=1.0, **changes)


@functools.partial(jax.jit, static_argnames="cfg")
def run(p, batch, cache=None, ends=None, *, cfg):
    x, cache, aux = bolmo.hidden(p, batch, cfg=cfg, cache=cache, ends=ends)
    return bolmo.logits(p, x, cfg=cfg), cache, aux


@functools.partial(jax.jit, static_argnames="cfg")
def parts(p, batch, *, cfg):
    """Encoder states, boundary, inputs and outputs of the layers over patches, and their number."""
    tokens = Tokens(batch.positions, batch.segments)
    h, _ = forward.encode(p, batch, cfg)
    boundary = lookahead.apply(p["rule"], Seen(h, tokens), cfg=cfg.rule)
    plan = forward.layout(boundary, tokens, cfg)
    pooled = forward.pool(p, h, plan)
    patches, _, _ = transformer.blocks(p["main"], pooled, plan.tokens, cfg=cfg.blocks)
    return h, boundary, pooled, patches, plan.count


@functools.cache
def alone(name):
    """Logits and boundaries of one text."""
    ids = ids_of(name)
    out, _, aux = run(model().params, batch([ids]), cfg=roomy())
    return np.asarray(out[0, : len(ids)]), np.asarray(aux["boundaries"][0][0, : len(ids)])


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_equals_the_official_one(name):
    official = {k.removeprefix(f"{name}."): v for k, v in numbers().items() if k.startswith(f"{name}.")}
    h, boundary, pooled, patches, count = parts(model().params, batch([ids_of(name)]), cfg=roomy())
    n, t = int(count[0]), len(ids_of(name))
    np.testing.assert_allclose(h[:, :t], official["enc_out"], atol=2e-5)
    np.testing.assert_allclose(pooled[:, :n], official["pooled"], atol=2e-5)
    np.testing.assert_array_equal(boundary.mark[:, :t], official["boundary_mask"])
    p = np.asarray(boundary.p)[:, : t - 1]
    np.testing.assert_allclose(np.log(p), official["boundary_logprobs"][:, :-1], atol=1e-5)
    np.testing.assert_allclose(patches[:, :n], official["patch_after_global"], atol=5e-5)
    found, marks = alone(name)
    np.testing.assert_allclose(found, official["logits"][0], atol=1e-4)
    np.testing.assert_array_equal(marks, official["boundary_mask"][0])


@pytest.mark.parametrize("name", ["compound", "cyr_arab", "short"])
def test_given_boundaries_give_the_official_logits(name):
    ends, t = numbers()[f"{name}.tf_boundary_mask"], len(ids_of(name))
    padded = np.pad(ends, ((0, 0), (0, 64 - t)))
    found, _, aux = run(model().params, batch([ids_of(name)]), ends=padded, cfg=roomy())
    np.testing.assert_allclose(found[:, :t], numbers()[f"{name}.tf_logits"], atol=1e-4)
    np.testing.assert_array_equal(aux["boundaries"][0][:, :t], ends)


@pytest.mark.parametrize("left", [False, True])
def test_a_row_of_a_batch_is_what_it_is_alone(left):
    rows = [ids_of(name) for name in NAMES]
    found, _, aux = run(model().params, batch(rows, left), cfg=roomy())
    t = found.shape[1]
    for i, (name, row) in enumerate(zip(NAMES, rows)):
        at = slice(t - len(row), t) if left else slice(0, len(row))
        np.testing.assert_allclose(found[i, at], alone(name)[0], atol=1e-4)
        np.testing.assert_array_equal(aux["boundaries"][0][i, at], alone(name)[1])
        assert int(aux["boundaries"][0][i].sum()) == alone(name)[1].sum()


def test_documents_packed_in_one_row_do_not_see_each_other():
    names, rows = ("short", "code", "compound"), [ids_of(n) for n in ("short", "code", "compound")]
    one = batch([np.concatenate(rows)])
    lengths = [len(r) for r in rows]
    positions, segments = (np.zeros(one.ids.shape, np.int32) for _ in range(2))
    positions[0, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    segments[0, : sum(lengths)] = np.repeat(np.arange(1, 4), lengths)
    found, _, _ = run(model().params, one.replace(positions=positions, segments=segments), cfg=roomy())
    expected = np.concatenate([alone(n)[0] for n in names])
    np.testing.assert_allclose(found[0, : len(expected)], expected, atol=1e-4)


def test_a_byte_changes_nothing_before_the_decision_on_its_predecessor():
    ids = ids_of("compound")
    changed = ids.copy()
    changed[30] = 4 + ord("Z")
    found, _, aux = run(model().params, batch([changed]), cfg=roomy())
    before, marks = alone("compound")
    # Its predecessor's boundary may depend on it, and so may what is read there.
    np.testing.assert_array_equal(found[0, :29], before[:29])
    np.testing.assert_array_equal(aux["boundaries"][0][0, :29], marks[:29])
    assert np.abs(np.asarray(found[0, 30:57]) - before[30:]).max() > 0.01


def test_too_many_patches_are_counted_and_found_room_for():
    lm = model()
    tight = dataclasses.replace(lm, config=dataclasses.replace(lm.config, capacity=0.3))
    ids = ids_of("compound")[None]
    assert int(run(lm.params, batch(ids), cfg=tight.config)[2]["lost"]) > 0
    padded, mask = np.pad(ids, ((0, 0), (0, 7))), np.arange(64)[None] < 57
    np.testing.assert_allclose(atom_jax.apply(tight, padded, mask).logits[0, :57], alone("compound")[0], atol=1e-4)
    assert bolmo.roomier(roomy()) is None


@functools.partial(jax.jit, static_argnames="cfg")
def one(p, batch, cache, *, cfg):
    x, cache, ready = bolmo.step(p, batch, cfg=cfg, cache=cache)
    return bolmo.logits(p, x, cfg=cfg)[:, 0], cache, ready


def with_tables(lm, unroll):
    p = bolmo.decode_params(lm.params, lm.config, unroll)
    return p | {"suffix": jax.tree.map(jnp.asarray, lm.tokenizer.tables)}


@pytest.mark.parametrize("unroll", [False, True])
def test_prompts_and_steps_equal_the_official_ones(unroll):
    """All six in one batch, whose rows wait for each other."""
    lm, rows = model(), [ids_of(n) for n in NAMES]
    lengths = np.array([len(r) for r in rows])
    given = [numbers()[f"{n}.gen_ids"][0] + 260 * numbers()[f"{n}.gen_boundary_mask"][0] for n in NAMES]
    out, cache, _ = run(lm.params, batch(rows), bolmo.init_cache(roomy(), 6, 256), cfg=roomy())
    # The decision on the last byte of the prompt: the step before it allows for its two forms only.
    for row, n, name in zip(np.asarray(out), lengths, NAMES):
        official = numbers()[f"{name}.gen_step_logits_noreset"][0]
        free = official > -1e4
        assert free.sum() == 2
        np.testing.assert_allclose(row[n - 2][free], official[free], atol=1e-3)
    p, cache = with_tables(lm, unroll), bolmo.unstack(cache) if unroll else cache
    done, found = np.zeros(6, int), np.zeros((6, 32, 520), np.float32)
    while (live := done < 32).any():
        ids = np.array([g[n - 1 + min(k, 31)] for g, n, k in zip(given, lengths, done)], np.int32)[:, None]
        logits, cache, ready = one(
            p, dataclasses.replace(batch(ids), segments=live[:, None].astype(np.int32)), cache, cfg=roomy()
        )
        ready = np.asarray(ready)
        assert (ready & ~live).sum() == 0 and ready.any()
        found[ready, done[ready]] = np.asarray(logits)[ready]
        done = done + ready
    for row, name in zip(found, NAMES):
        np.testing.assert_allclose(row, numbers()[f"{name}.gen_step_logits_noreset"][1:], atol=1e-3)
    np.testing.assert_array_equal(cache.length, lengths + 31)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_layers_over_patches_decode_as_they_read(family):
    main = TransformerConfig(family=family, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48)
    cfg = BolmoConfig(main=main, subwords=0, decoder_layers=1, local_heads=2, local_d_ff=48, capacity=1.0)
    p = params.init(jax.random.key(1), bolmo.spec(cfg))
    p = p | {"rule": {k: jax.random.normal(jax.random.key(2), v.shape) for k, v in p["rule"].items()}}
    lm = LM(cfg, p, None)
    ids = ids_of("compound")[None]
    whole, _, aux = run(p, batch(ids, lm=lm), cfg=cfg)
    marks = np.asarray(aux["boundaries"][0][0])
    assert 5 < marks.sum() < 50
    _, cache, _ = run(p, batch(ids[:, :20], lm=lm), bolmo.init_cache(cfg, 1, 64), cfg=cfg)
    for t in range(19, 57):
        step = batch(ids[:, t : t + 1] + 260 * marks[t], lm=lm)
        logits, cache, ready = one(p, step, cache, cfg=cfg)
        assert bool(ready[0])
        np.testing.assert_allclose(logits[0], whole[0, t], atol=2e-4)


def test_bfloat16_is_close():
    p, b = params.cast(model().params, jnp.bfloat16), batch([ids_of("compound")])
    ends = np.pad(alone("compound")[1][None], ((0, 0), (0, 7)))
    found, _, _ = run(p, b, ends=ends, cfg=roomy(dtype="bfloat16"))
    exact = alone("compound")[0]
    assert found.dtype == jnp.float32 and np.linalg.norm(found[0, :57] - exact) < 0.05 * np.linalg.norm(exact)


def test_gradients_reach_every_parameter_and_recomputing_changes_none():
    b = batch([ids_of("short"), ids_of("compound")[:20]])
    targets = jnp.roll(b.ids, -1, axis=1)
    b = dataclasses.replace(b, marks=jnp.asarray(b.ids % 5 == 0))

    def loss(p, cfg):
        x, _, aux = bolmo.hidden(p, b, cfg=cfg)
        logp = jax.nn.log_softmax(bolmo.logits(p, x, cfg=cfg))
        nats = -jnp.take_along_axis(logp, bolmo.codec(cfg).fuse(targets, aux)[..., None], axis=-1)[..., 0]
        return jnp.sum(nats * (b.segments > 0)) + aux["loss"]

    grads = jax.jit(jax.grad(loss), static_argnums=1)(model().params, roomy())
    chex.assert_tree_all_finite(grads)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    again = jax.jit(jax.grad(loss), static_argnums=1)(model().params, roomy(remat=True))
    chex.assert_trees_all_close(again, grads, atol=1e-4, rtol=1e-4)


def test_what_is_missing_is_said():
    b = dataclasses.replace(batch([ids_of("short")]), suffix=None)
    with pytest.raises(AtomError, match="needs its subword tokenizer"):
        bolmo.hidden(model().params, b, cfg=roomy())
    with pytest.raises(AtomError, match="needs its subword tokenizer"):
        atom_jax.generate(dataclasses.replace(model(), tokenizer=None), [[1, 40]], 2)
    with pytest.raises(AtomError, match="3 mLSTM heads do not divide"):
        roomy(local_heads=3)
    with pytest.raises(AtomError, match="520 ids, got 512"):
        roomy(vocab_size=512)


def test_apply_finds_the_subwords_itself():
    lm, ids = model(), ids_of("mixed")
    # Ids at the ends of patches are the same bytes.
    fused = ids + 260 * (np.arange(len(ids)) % 2)
    for given in (ids, fused):
        padded, mask = np.pad(given[None], ((0, 0), (0, 4))), np.arange(64)[None] < 60
        np.testing.assert_allclose(atom_jax.apply(lm, padded, mask).logits[0, :60], alone("mixed")[0], atol=1e-4)
    assert lm.tokenizer.decode(ids) == texts()["mixed"]
    assert isinstance(batch([ids]).suffix, Suffix)
