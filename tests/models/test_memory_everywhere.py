"""Any policy in any attention layer that sees everything, whatever stands next to it, in every family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.inference import continuation
from atom_jax.kvcache import memory
from atom_jax.kvcache.budget import BudgetLayer
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.dms.serve import DMSLayer
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.quest import QuestLayer
from atom_jax.kvcache.window import WindowLayer
from atom_jax.models import bolmo, layers, registry, transformer
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.bolmo.config import FUSED
from atom_jax.models.registry import with_memory
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import reading
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError, Batch
from tests.models.tiny_units import MODELS, stream, weights

pytestmark = pytest.mark.usefixtures("scanned")
MIXED = ("sliding", "sliding", "full") * 2
PROMPTS = [list(range(3, 43)), list(range(60, 45, -1)), [7]]
LEARNED = DMS("observed", window=5, scale=1.0, offset=0.0, shared=2, page=4)


def build(kinds=MIXED, policy=None, family="olmo3"):
    """A transformer whose evictors, if it has any, evict about half of what they see."""
    cfg = TransformerConfig(
        family=family, d_model=32, n_layers=len(kinds), n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_length=512,
        layer_types=tuple(kinds), sliding_window=9, memory=policy,
    )  # fmt: skip
    return LM(cfg, learned(params.init(jax.random.key(3), transformer.spec(cfg))), None)


def learned(tree):
    """Random evictors in place of new ones."""
    flat = params.flatten(tree)
    for i, (path, x) in enumerate(flat.items()):
        if "/dms/" in path and not path.endswith("norm"):
            flat[path] = jax.random.normal(jax.random.key(i), x.shape)
    return params.unflatten(flat)


def kinds_of(lm):
    cache = registry.of(lm.config).init_cache(lm.config, 2, 64)
    stacks = lambda node: jax.tree.leaves(node.layers, is_leaf=lambda x: isinstance(x, memory.Stack))  # noqa: E731
    return [[type(one.states).__name__ for one in stacks(node)] for node in memory.nodes(cache)]


def test_sliding_layers_keep_their_ring_and_full_ones_the_policy():
    ring, budget, dense, quest = (x.__name__ for x in (WindowLayer, BudgetLayer, DenseLayer, QuestLayer))
    assert kinds_of(build()) == [[ring, ring, dense]]
    assert kinds_of(build(policy=parse("tova:budget=8"))) == [[ring, ring, budget]]
    assert kinds_of(build(policy=parse("quest:budget=32;2=none"))) == [[ring, dense, ring, quest]]
    assert kinds_of(build(("full",) * 4, parse("quest:budget=32;0=none;1=none"))) == [[dense, quest]]
    assert kinds_of(build(policy=LEARNED)) == [[ring, ring, DMSLayer.__name__]]
    with pytest.raises(AtomError, match="memory"):
        build(policy="tova")


# Layer 0 slides: room for one more than its window, since what leaves is chosen before the window moves on.
@pytest.mark.parametrize("text", ["tova:budget=200", "quest:budget=512;5=none", "h2o:budget=200;0=tova:budget=10"])
def test_room_for_everything_is_the_dense_cache(text):
    lm = build()
    expected = atom_jax.generate(lm, PROMPTS, 30)
    found = atom_jax.generate(with_memory(lm, parse(text)), PROMPTS, 30)
    assert found.ids == expected.ids
    small = atom_jax.generate(with_memory(lm, parse("tova:budget=8")), PROMPTS, 30)
    assert small.stats["kv_reads"] < 0.7 * expected.stats["kv_reads"]


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("policy", [LEARNED, dataclasses.replace(LEARNED, form="adapter", shared=0, rank=2)])
def test_learned_evictors_beside_sliding_layers_decode_as_they_are_trained(policy, unroll):
    lm = build(policy=policy)
    ids = np.random.default_rng(0).integers(0, 264, (2, 60))
    x, _, aux = transformer.hidden(lm.params, Batch(ids, *places(60)), cfg=lm.config)
    assert aux["evict"].shape == (2, 2, 2, 60) and 0.2 < float(aux["evict"].mean()) < 0.8
    expected = transformer.logits(lm.params, x, cfg=lm.config)
    p = transformer.decode_params(lm.params, lm.config, unroll)
    (last, cache), _ = reading.read_prompt(lm.params, ids[:, :40], np.array([40, 40]), cfg=lm.config, capacity=96)
    first = transformer.logits(lm.params, last[:, None], cfg=lm.config)[:, 0]
    np.testing.assert_allclose(first, expected[:, 39], atol=1e-4)
    step = jax.jit(lambda batch, cache: transformer.apply(p, batch, cfg=lm.config, cache=cache))
    cache = memory.grow(memory.unstack(cache) if unroll else cache)
    for t in range(40, 60):
        out, cache = step(Batch(ids[:, t, None], cache.length[:, None], jnp.ones((2, 1), jnp.int32)), cache)
        np.testing.assert_allclose(out.logits[:, 0], expected[:, t], atol=1e-4)
    held = layers.ask(lm.config.attentions, cache.layers, lambda x: x.held(cache.length))
    np.testing.assert_array_equal(held[jnp.array([2, 5])], aux["occupancy"])


def places(t, b=2, start=0):
    at = start + jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    return at, jnp.ones_like(at)


# Of layers apart: tests/session.
@pytest.mark.parametrize("policy", ["none", "tova:budget=12", "quest:budget=16,page=4;2=none", LEARNED], ids=str)
def test_tokens_that_were_tried_leave_no_trace(policy):
    lm = build(policy=parse(policy) if isinstance(policy, str) else policy)
    cfg, ids = lm.config, np.random.default_rng(1).integers(0, 264, (2, 50))
    (_, cache), _ = reading.read_prompt(lm.params, ids[:, :30], np.array([30, 17]), cfg=cfg, capacity=64)
    p = transformer.decode_params(lm.params, cfg, unroll=False)
    cache = memory.grow(cache, 8)
    run = functools.partial(jax.jit(transformer.hidden, static_argnames=("cfg", "tentative")), p, cfg=cfg)
    draft = Batch(ids[:, 30:36], cache.length[:, None] + jnp.arange(6)[None], jnp.ones((2, 6), jnp.int32))
    states, pending, _ = run(draft, cache=cache, tentative=True)
    accepted = np.array([4, 2])
    found = jax.jit(transformer.commit)(cache, pending, accepted)
    plain = cache
    for i in range(4):
        real = (i < accepted).astype(np.int32)[:, None]
        one = Batch(draft.ids[:, i : i + 1], plain.length[:, None], jnp.asarray(real))
        x, plain, _ = run(one, cache=plain)
        for row in np.flatnonzero(real):
            np.testing.assert_allclose(states[row, i], x[row, 0], atol=2e-5)
    np.testing.assert_array_equal(found.length, plain.length)
    for t in range(3):
        after = Batch(ids[:, 40 + t, None], found.length[:, None], jnp.ones((2, 1), jnp.int32))
        (x, found, _), (y, plain, _) = run(after, cache=found), run(after, cache=plain)
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("name", ["tova", "kvcompose", "razor_attention"])
def test_prompt_only_decodes_as_a_continuation_that_is_stored_whole(name):
    """As kvpress scores: the context is compressed, and what follows is all seen."""
    more = {"razor_attention": "least=3,sinks=1,"}.get(name, "")
    lm = with_memory(build(("full",) * 3, family="qwen3"), parse(f"{name}:ratio=0.25,{more}prompt_only=true"))
    made = atom_jax.generate(lm, PROMPTS[:2], 40)
    assert made.stats["kv_entries_peak"] >= 2 * 40
    for prompt, new in zip(PROMPTS, made.ids):
        scores = continuation.score(lm, [prompt], [new])
        assert scores.hits.all()
        np.testing.assert_array_equal(scores.held_after, scores.held + len(new) - 1)


def test_layers_over_units_with_room_for_everything():
    cfg = MODELS["hnet-2"]
    lm = LM(cfg, weights(cfg), None)
    prompts = [stream(n, start).tolist() for n, start in ((40, 3), (25, 20), (1, 8))]
    policies = parse("expected_attention:budget=200,future=8;2=quest:budget=512")
    assert atom_jax.generate(with_memory(lm, policies), prompts, 30).ids == atom_jax.generate(lm, prompts, 30).ids


def over_units(name):
    """A model with evictors over its units: learned ones, or those that keep separators, known by the marks' ids."""
    kept = DMS("separators", window=1, separators=tuple(range(0, 264, 2)), page=4)
    if name == "bolmo":
        return bolmo_over(kept)
    cfg = dataclasses.replace(
        MODELS[name], memory=dataclasses.replace(LEARNED, window=2, shared=0) if name == "words" else kept
    )
    return LM(cfg, learned(weights(cfg)), None)


@pytest.mark.parametrize("name", ["words", "hnet-2", "bolmo"])
def test_evictors_over_units_decode_as_they_are_trained(name):
    lm, t, more, left = over_units(name), 64, 6, []
    ids = np.stack([stream(t + 1, start) for start in (3, 20)])
    out = atom_jax.apply(lm, ids)
    evict = np.concatenate([np.reshape(x, (-1, *x.shape[-3:])) for x in out.aux["memory"][-1]["evict"]])
    ends = np.asarray(out.aux["boundaries"][-1])
    for row, marks, mine in zip(ids, ends, evict.swapaxes(0, 1)):
        mine = mine[..., : marks.sum()]
        left += mine.ravel().tolist()
        if name != "words":
            np.testing.assert_array_equal(mine, np.broadcast_to(row[marks] % 2 > 0, mine.shape))
    assert 0.2 < np.mean(left) < 0.8
    # Prompt, later turn, and single tokens, which a Bolmo is told with their forms, the last one given included.
    pending = registry.of(lm.config).codec(lm.config).pending
    session = Session.prefill(lm, ids[:, : t // 2]).extend(ids[:, t // 2 : t - more])
    forms = ids + FUSED * ends if pending else ids
    found = session.verify(forms[:, t - more - pending : t]).logits
    np.testing.assert_allclose(found, out.logits[:, t - more - pending - 1 : t], atol=2e-4)


def test_layers_of_a_stack_of_many_kinds_pass_no_evidence_on():
    cfg = dataclasses.replace(MODELS["words"], memory=LEARNED)
    with pytest.raises(AtomError, match="make shared 0"):
        registry.of(cfg).init_cache(cfg, 1, 8)


def test_a_bolmo_with_room_for_everything():
    lm = bolmo_over(None)
    prompts = [(4 + np.random.default_rng(0).integers(0, 200, n)).tolist() for n in (90, 50)]
    policy = parse("none;1=snapkv:budget=200,window=4")
    assert atom_jax.generate(with_memory(lm, policy), prompts, 20).ids == atom_jax.generate(lm, prompts, 20).ids


def bolmo_over(policy):
    main = dataclasses.replace(build().config, layer_types=("sliding", "full"), n_layers=2, memory=policy)
    cfg = BolmoConfig(main=main, subwords=0, decoder_layers=1, local_heads=2, local_d_ff=48, capacity=1.0)
    p = params.init(jax.random.key(1), bolmo.spec(cfg))
    rule = {name: jax.random.normal(jax.random.key(2), x.shape) for name, x in p["rule"].items()}
    return LM(cfg, p | {"rule": rule}, None)


def test_bolmo_gives_back_the_pages_of_what_it_evicts():
    policy = DMS("adapter", window=4, offset=-100.0, page=4, bias=True)
    lm = bolmo_over(policy)
    prompt = (4 + np.random.default_rng(0).integers(0, 200, 400)).tolist()
    made = atom_jax.generate(lm, [prompt], 4)
    # Every key is evicted when it leaves the window: 5 entries in each of two heads, and the ring of 9.
    assert made.stats["kv_entries_peak"] == (9 + 5) / 2
    patches = memory.nodes(registry.of(lm.config).init_cache(lm.config, 1, 400))[1]
    assert params.nbytes(patches.layers) > 20 * 1024
    rest = made.stats["kv_bytes"] - params.nbytes(registry.of(lm.config).init_cache(lm.config, 1, 1).layers)
    assert rest < 12 * 1024
