"""The cache next to the pass without one, and what merging means for attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import checkpoint, params
from atom_jax.kvcache import paged
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.dmc import DMC, decide, serve
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.nn.attention import Tokens, attend
from atom_jax.nn.self_attention import self_attend
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.kvcache.dms.test_serve import PARTS, TURNS, batch_of, follow, whole

MASS = DMC("adapter", scale=1.0, offset=0.0, mass=True, turned=True, bias=True, sinks=2, page=4)
WINDOW = dataclasses.replace(MASS, form="observed", window=6)
EITHER = dataclasses.replace(WINDOW, evicts=True)


def untrained(memory, **sizes):
    """A model with random weights that merges about half of its tokens."""
    cfg = transformer.TransformerConfig(**{
        "vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48,
        "max_length": 4096, "memory": memory, **sizes,
    })  # fmt: skip
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    learned = tree["layers"]["attn"].get("dmc", {})
    for key, name in zip(jax.random.split(jax.random.key(1), 9), sorted(learned)):
        if name != "norm":
            learned[name] = jax.random.normal(key, learned[name].shape) * 0.5
    return cfg, tree


CASES = {
    "mass-turns-apart": (MASS, TURNS, True),
    "span-parts": (DMC("borrowed", span=5, offset=0.0, page=4), PARTS, False),
    "window-turns": (WINDOW, TURNS, False),
    "evicts-turns": (EITHER, TURNS, True),
    "window-span-parts-apart": (DMC("adapter", scale=1.0, offset=0.0, window=9, span=5, page=4), PARTS, True),
}


@pytest.mark.parametrize(("memory", "calls", "unstacked"), CASES.values(), ids=list(CASES))
def test_like_the_pass_without_a_cache(memory, calls, unstacked, monkeypatch):
    monkeypatch.setattr(paged, "AHEAD", 16)
    cfg, tree = untrained(memory)
    ids = np.random.default_rng(0).integers(0, 48, (3, int(np.sum(calls, axis=0).max())))
    worst, held, expected = follow(tree, ids, calls, cfg=cfg, unstacked=unstacked)
    assert worst < 1e-4
    np.testing.assert_array_equal(held, expected)
    assert int(held.sum()) < 0.8 * 2 * 2 * np.sum(calls)


def test_what_never_merges_is_the_model_itself():
    """Bit for bit; and a document does not merge with the one before it."""
    cfg, tree = untrained(dataclasses.replace(MASS, offset=1000.0, mass=False))
    plain = dataclasses.replace(cfg, memory=None)
    batch = batch_of(np.random.default_rng(0).integers(0, 48, (2, 40)))
    out, aux = whole(tree, batch, cfg=cfg)
    np.testing.assert_array_equal(out, whole(tree, batch, cfg=plain)[0])
    np.testing.assert_array_equal(aux["occupancy"], np.full((2, 2, 2), 40))
    cfg = dataclasses.replace(cfg, memory=MASS)
    second = jnp.arange(40)[None] >= 25
    two = batch.replace(positions=batch.positions - 25 * second, segments=batch.segments + second)
    ours, aux = whole(tree, two, cfg=cfg)
    alone, _ = whole(tree, batch_of(batch.ids[:, 25:]), cfg=cfg)
    np.testing.assert_allclose(ours[:, 25:], alone, atol=1e-5)
    assert aux["evict"].any() and not aux["evict"][..., 24].any()


def test_the_newest_tokens_stand_for_themselves():
    """A query that sees nothing but them answers as without merging, and the first one after it does not."""
    cfg, tree = untrained(WINDOW, n_layers=1)
    batch = batch_of(np.random.default_rng(0).integers(0, 48, (2, 40)))
    out, aux = whole(tree, batch, cfg=cfg)
    plain, _ = whole(tree, batch, cfg=dataclasses.replace(cfg, memory=None))
    merged = np.asarray(aux["evict"])[0].any(1)
    # The token at t + 1 merges with that at t once the query stands 6 places after it.
    first = merged.argmax(1) + 1 + WINDOW.window
    change = np.abs(out - plain).max(-1)
    for row, at in enumerate(first):
        assert change[row, :at].max() < 1e-5 < change[row, at]


def test_eviction_alone_hides_keys_beyond_the_window():
    """As `attend` does for Dynamic Memory Sparsification."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 2, 3, 30, 8), (1, 2, 30, 8), (1, 2, 30, 8)))
    e = jnp.asarray(rng.normal(size=(1, 2, 30)), jnp.float32)
    place = jnp.arange(30, dtype=jnp.int32)[None]
    said = decide.Said(jnp.full_like(e, -9.0), jnp.ones_like(e), e)
    places = Tokens(place, place * 0 + 1)
    memory = dataclasses.replace(EITHER, form="adapter")
    call = Call(q, k, v, places, jnp.zeros(1, jnp.int32), k_plain=k, said=said, rotary=0, mode=Mode())
    seen = memory.train(call)
    out = self_attend(q, seen.k, seen.v, places, keep_bht=seen.keep, bias_bht=seen.bias, newest=seen.newest)
    gone = (e > 0) & (place > memory.sinks)[:, None]
    keep = jnp.where(gone, -1e30, 0.0)
    expected = attend(q, k, v, places, places, keep_bhs=keep, keep_window=memory.window - 1)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    layer = jax.tree.map(lambda x: x[0], serve.init(memory, Sizes(1, 1, 2, 3, 8, jnp.float32), 30, 1))
    served, layer = layer.one_by_one(call)
    np.testing.assert_allclose(served, expected, atol=1e-6)
    np.testing.assert_array_equal(layer.held(jnp.array([30])), seen.aux["occupancy"])
    assert int(seen.aux["occupancy"].sum()) < 50


@pytest.mark.parametrize("mass", [True, False])
def test_with_its_mass_an_entry_of_equal_tokens_is_attended_to_as_they_are(mass):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 3, 9, 8), (1, 1, 9, 8), (1, 1, 9, 8)))
    k, v = (x.at[:, :, 3:6].set(x[:, :, 3:4]) for x in (k, v))
    place = jnp.arange(9, dtype=jnp.int32)[None]
    merge = (place == 4) | (place == 5)
    # Equal tokens weigh the same.
    w = jnp.asarray(rng.random((1, 1, 9)), jnp.float32).at[:, :, 3:6].set(0.3)
    said = decide.Said(jnp.where(merge, 1.0, -1.0)[:, None], w)
    zero = jnp.zeros(1, jnp.int32)
    call = Call(q, k, v, Tokens(place, place * 0 + 1), zero, k_plain=k, said=said, rotary=0, mode=Mode())
    sizes = Sizes(1, 1, 1, 3, 8, jnp.float32)
    memory = dataclasses.replace(MASS, mass=mass, sinks=0, turned=False)
    layer = jax.tree.map(lambda x: x[0], serve.init(memory, sizes, 9, 1))
    out, layer = layer.one_by_one(call)
    dense, _ = DenseLayer.empty(1, 1, 9, 8, jnp.float32).one_by_one(call)
    worst = float(jnp.abs(out - dense).max())
    assert worst < 1e-6 if mass else worst > 1e-2
    assert int(layer.pool.n[0, 0]) == 7


@pytest.mark.parametrize("memory", [MASS, WINDOW, EITHER], ids=["at-once", "window", "either"])
def test_relaxed_decisions_have_gradients_and_come_near_the_hard_ones(memory):
    cfg, tree = untrained(dataclasses.replace(memory, tau=1e-3))
    batch = batch_of(np.random.default_rng(0).integers(0, 48, (1, 20)))

    @jax.jit
    def outs(tree):
        return [transformer.hidden(tree, batch, cfg=cfg, mode=Mode(kind))[0] for kind in ("hard", "relaxed")]

    hard, relaxed = outs(tree)
    np.testing.assert_allclose(hard, relaxed, atol=2e-3)
    soft = dataclasses.replace(cfg, memory=dataclasses.replace(memory, tau=1.0))
    states = lambda tree: transformer.hidden(tree, batch, cfg=soft, mode=Mode("relaxed"))[0]  # noqa: E731
    grads = jax.jit(jax.grad(lambda tree: jnp.square(states(tree) - hard).sum()))(tree)["layers"]["attn"]["dmc"]
    for name in grads.keys() - {"norm"}:
        assert np.isfinite(grads[name]).all() and float(jnp.abs(grads[name]).max()) > 1e-4, name


@pytest.mark.parametrize("memory", [dataclasses.replace(EITHER, cr=3.0, scale=2.0), DMC("borrowed", span=12)])
def test_checkpoints(tmp_path, memory):
    cfg, tree = untrained(memory, vocab_size=264, max_length=64)
    checkpoint.save_hf(LM(cfg, tree, ByteTokenizer()), tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.config == cfg
    jax.tree.map(np.testing.assert_array_equal, again.params, tree)
    own = "atom_dmc" in (tmp_path / "config.json").read_text()
    assert own == (memory.form == "observed")


@pytest.mark.parametrize(
    "field,value",
    [("form", "x"), ("span", -1), ("tau", 0.0), ("sinks", -1), ("page", 0), ("bias", True), ("window", -1)],
)
def test_senseless_configurations_are_refused(field, value):
    with pytest.raises(AtomError, match=field):
        DMC(**{"form": "borrowed", field: value})
    with pytest.raises(AtomError, match=r"memory\.window: the form observed needs at least 2, got 1"):
        DMC("observed", window=1)
    with pytest.raises(AtomError, match=r"memory\.evicts: expected projections, no span, and turned=true"):
        DMC("adapter", evicts=True)
