"""Decisions, their relaxation and exact sparse attention, next to the official code's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.kvcache.dms import DMS, observed
from atom_jax.kvcache.dms.decide import Mode
from atom_jax.models import transformer
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError
from tests.kvcache.dms import tiny


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def case(request, golden):
    return tiny.load(golden / "dms" / request.param)


def forward(case, mode, **changes):
    cfg, params, io = case
    cfg = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, **changes))
    x, _, aux = transformer.hidden(params, tiny.batch(io["input_ids"]), cfg=cfg, mode=mode)
    return transformer.logits(params, x, cfg=cfg), aux


def test_the_teacher_evicts_nothing(case):
    np.testing.assert_allclose(forward(case, Mode("off"))[0], case[2]["train_teacher_logits"], atol=2e-4)


@pytest.mark.parametrize("setting", ["nonoise_tau0.1", "noise_tau0.1", "noise_tau20"])
def test_relaxed_logits_and_decisions_equal_the_official_ones(case, setting):
    io = case[2]
    noise = None if setting.startswith("nonoise") else jnp.asarray(io["train_noise"])
    out, aux = forward(case, Mode("relaxed", noise), tau=float(setting.partition("tau")[2]))
    np.testing.assert_allclose(out, io[f"train_{setting}_logits"], atol=2e-4)
    np.testing.assert_allclose(aux["evict_soft"], io[f"train_{setting}_decisions_ste"], atol=1e-5)


def test_hard_decisions_and_occupancy_are_exactly_the_official_ones(case):
    out, aux = forward(case, None)
    np.testing.assert_allclose(out, case[2]["prefill_logits"], atol=3e-4)
    np.testing.assert_array_equal(aux["occupancy"], case[2]["prefill_occupancy"])
    np.testing.assert_array_equal(aux["evict"][..., :-1], case[2]["prefill_decisions"][..., 1:] > 0)
    assert not aux["evict"][..., -1].any()


def test_a_decision_is_about_the_token_before(case):
    """With the bits one token late, the logits are far from the official ones."""
    io = case[2]
    _, aux = forward(case, None)
    late = jnp.where(jnp.pad(aux["evict"][..., :-1], [(0, 0)] * 3 + [(1, 0)]), -1e30, 0.0)
    out, _ = forward(case, Mode("given", late))
    assert np.abs(out - io["prefill_logits"]).max() > 1.0
    right, _ = forward(case, Mode("given", jnp.where(aux["evict"], -1e30, 0.0)))
    np.testing.assert_allclose(right, io["prefill_logits"], atol=3e-4)


def test_heads_decide_by_the_mean_of_their_logits(case):
    noise = jnp.asarray(case[2]["train_noise"])
    each = forward(case, Mode("relaxed", noise), per="head")[1]["evict_logits"]
    together = forward(case, Mode("relaxed", noise), per="mean")[1]
    # Later layers see what this one has evicted.
    mean = jnp.broadcast_to(each[:1].mean(2, keepdims=True), each[:1].shape)
    np.testing.assert_allclose(together["evict_logits"][:1], mean, rtol=1e-5, atol=1e-5)
    _, hard = forward(case, None, per="mean")
    np.testing.assert_array_equal(hard["evict"][:1], mean > 0)
    for x in (hard["evict"], together["evict_soft"]):
        assert (x == x[:, :, :1]).all() and 0 < x.mean() < 1


def test_sinks_stay_and_zero_weights_change_nothing(case):
    cfg, params, io = case
    _, aux = forward(case, None, sinks=7)
    assert not aux["evict"][..., :7].any() and aux["evict"].any()
    if cfg.memory.form == "adapter":
        zero = jax.tree.map(jnp.zeros_like, params["layers"]["attn"]["dms"])
        layers = {**params["layers"], "attn": {**params["layers"]["attn"], "dms": zero}}
        batch = tiny.batch(io["input_ids"])
        x, _, aux = transformer.hidden({**params, "layers": layers}, batch, cfg=cfg)
        base, _, _ = transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"))
        assert not aux["evict"].any()
        np.testing.assert_allclose(x, base, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("form", ["borrowed", "adapter", "observed"])
def test_every_family_and_form_is_causal_and_evicts(family, form):
    memory = DMS(form=form, window=5, bias=form != "borrowed", scale=20.0, offset=0.0)
    cfg = transformer.TransformerConfig(
        family=family, vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
        memory=memory,
    )  # fmt: skip
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    if form != "borrowed":
        learned = params["layers"]["attn"]["dms"]
        learned["alpha"] = jax.random.normal(jax.random.key(1), learned["alpha"].shape) * 0.1
    if form == "observed":
        learned["observed"] = learned["observed"] - 0.2
        learned["bias"] = learned["bias"] - 0.9
    ids = np.random.default_rng(0).integers(0, 50, (2, 40))
    x, _, aux = transformer.hidden(params, tiny.batch(ids), cfg=cfg)
    assert 0.1 < aux["evict"].mean() < 0.9
    changed = ids.copy()
    changed[:, 25:] = (changed[:, 25:] + 7) % 50
    y, _, _ = transformer.hidden(params, tiny.batch(changed), cfg=cfg)
    np.testing.assert_allclose(x[:, :25], y[:, :25], atol=1e-5)


@pytest.mark.parametrize("t,before,window", [(40, 0, 6), (17, 5, 6), (3, 7, 6), (12, 0, 20)])
def test_received_attention_equals_its_definition(t, before, window):
    s = t + before
    keys = jax.random.split(jax.random.key(t), 2)
    q, k = jax.random.normal(keys[0], (2, 2, 3, t, 8)), jax.random.normal(keys[1], (2, 2, s, 8))
    places = jnp.broadcast_to(jnp.arange(s)[None] + 30, (2, s))
    segments = jnp.ones((2, s), jnp.int32).at[1, : s // 3].set(2)
    here = Tokens(places[:, before:], segments[:, before:])
    got = observed.received(q, k, here, Tokens(places, segments), window)
    distance = np.arange(before, s)[:, None] - np.arange(s)[None]
    seen = (distance >= 0) & (distance <= window)
    seen = seen[None] & np.asarray(here.segments[:, :, None] == segments[:, None])
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k) * 8**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    weights = np.where((seen & (distance[None] > 0))[:, None, None], weights, 0.0)
    late = weights * (distance > window // 2)[None, None, None]
    for mine, theirs in zip(got, (weights.max((2, 3)), weights.sum((2, 3)), late.sum((2, 3)))):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_corrections_hold_only_where_keys_may_be_evicted():
    cfg = transformer.TransformerConfig(
        vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
        memory=DMS(window=5, rank=2, scale=1.0, offset=5.0),
    )  # fmt: skip
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    batch = tiny.batch(np.random.default_rng(0).integers(0, 50, (2, 40)))
    states = lambda mode: transformer.hidden(params, batch, cfg=cfg, mode=mode)[0]  # noqa: E731
    before = states(Mode("hard"))
    np.testing.assert_allclose(before, states(Mode("off")), atol=1e-6)
    learned = params["layers"]["attn"]["dms"]
    for name in ("q_b", "k_b", "v_b", "o_b"):
        learned[name] = jax.random.normal(jax.random.key(1), learned[name].shape) * 0.1
        new = states(Mode("hard"))
        assert float(jnp.abs(new - before).max()) > 1e-3
        before = new
    whole = dict(params["layers"]["attn"])
    for name, pattern in (
        ("q", "ldr,lrnk->ldnk"),
        ("k", "ldr,lrnk->ldnk"),
        ("v", "ldr,lrnk->ldnk"),
        ("o", "lnkr,lrd->lnkd"),
    ):
        whole[name] = whole[name] + jnp.einsum(pattern, learned[f"{name}_a"], learned[f"{name}_b"])
    params = {**params, "layers": {**params["layers"], "attn": whole}}
    np.testing.assert_allclose(states(Mode("off")), before, atol=1e-5)


def test_logits_change_with_every_doubling_of_the_position_beyond():
    cfg = transformer.TransformerConfig(
        vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
        memory=DMS("observed", window=5, scale=2.0, offset=1.0, bias=True, beyond=8),
    )  # fmt: skip
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    batch = tiny.batch(np.random.default_rng(0).integers(0, 50, (1, 40)))
    places = np.concatenate([np.arange(25), np.arange(15)])
    batch = batch.replace(positions=places[None], segments=1 + (np.arange(40) >= 25)[None])
    logits = lambda p: transformer.hidden(p, batch, cfg=cfg, mode=Mode("off"))[2]["evict_logits"]  # noqa: E731
    before, learned = logits(params), params["layers"]["attn"]["dms"]
    learned["slope"] = slope = jax.random.normal(jax.random.key(1), learned["slope"].shape)
    # The decision about a key is taken by the token after it.
    doublings = np.log2(np.maximum(places[1:] / 8, 1.0))
    expected = 2.0 * doublings * np.asarray(slope)[:, None, :, None]
    np.testing.assert_allclose((logits(params) - before)[..., :-1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "field,value",
    [
        ("form", "x"),
        ("per", "token"),
        ("window", 0),
        ("tau", 0.0),
        ("sinks", -1),
        ("rank", -1),
        ("shared", 1),
        ("beyond", -1),
    ],
)
def test_senseless_configurations_are_refused(field, value):
    with pytest.raises(AtomError, match=field):
        DMS(**{field: value})
