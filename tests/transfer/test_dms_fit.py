"""Evictors fitted in closed form."""

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
from atom_jax.nn.norm import rms_norm
from atom_jax.transfer import dms_fit, ridge
from atom_jax.transfer.ridge import FitConfig
from atom_jax.typing import AtomError, Batch

T, WINDOW = 256, 12


@pytest.fixture(scope="module", params=["observed", "adapter", "shared"])
def model(request):
    form, shared = ("observed", 2) if request.param == "shared" else (request.param, 0)
    memory = DMS(form=form, window=WINDOW, scale=2.0, offset=0.5, bias=True, shared=shared, sinks=2)
    cfg = transformer.TransformerConfig(
        vocab_size=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, memory=memory
    )
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    params["layers"]["attn"]["q"] = params["layers"]["attn"]["q"] * 6
    return cfg, params


def whole(ids):
    return Batch(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))


def rows(n, seed=0):
    draw = np.random.default_rng(seed)
    return iter([whole(jnp.asarray(draw.integers(0, 40, (1, T)), jnp.int32)) for _ in range(n)])


def test_attention_targets_are_the_largest_later_attention():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (1, 2, *shape)) for key, shape in zip(keys, ((3, T, 8), (T, 8), (T, 8))))
    place = jnp.arange(T)[None]
    got = dms_fit._largest(q, k, v, Tokens(place, jnp.ones_like(place)), WINDOW)
    distance = place[0][:, None] - place
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k) * 8**-0.5
    weights = jax.nn.softmax(jnp.where((distance >= 0)[None, None, None], scores, -1e30), axis=-1)
    expected = jnp.where((distance > WINDOW)[None, None, None], weights, 0.0).max((2, 3))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_weights_are_those_of_least_squares(model):
    cfg, params = model
    batch = next(rows(1))
    y = dms_fit.targets(params, batch, jax.random.key(0), cfg=cfg, target="attention")
    told = jax.random.normal(jax.random.key(3), (2, 4, 2, cfg.memory.shared)) * 0.1
    params = ridge.learned(params, cfg, {"tell": told} if cfg.memory.shared else {})
    alpha, constant, seen = ridge.solve(jax.device_get(dms_fit._sums(params, batch, y, cfg=cfg)), 1e-9)

    def probe(p, heads, call):
        x = rms_norm(heads.x_btd, p["dms"]["norm"], cfg.norm_eps)
        return x, observed.observe(call.q, call.k, call.tokens, WINDOW)

    _, _, aux = transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)
    x, o = map(np.asarray, aux["probe"])
    used = slice(cfg.memory.sinks, T - WINDOW - ridge.LEAST_QUERIES)
    for layer in range(2):
        for head in range(2):
            columns = [np.roll(x[layer, 0], -1, 0), np.ones((T, 1))]
            w = [alpha[layer, :, head], constant[layer, None, head]]
            if cfg.memory.form == "observed":
                columns.append(o[layer, 0, head])
                w.append(seen[layer, :, head])
            if cfg.memory.shared:
                everyone = np.concatenate([o[: layer + 1, 0], np.ones_like(o[: layer + 1, 0, ..., :1])], axis=-1)
                columns.append(np.einsum("lhtf,lfhc->tc", everyone, told[: layer + 1]))
            a, b = np.concatenate(columns, 1)[used], np.asarray(y)[layer, 0, head][used]
            best = a @ np.linalg.lstsq(a, b, rcond=None)[0]
            np.testing.assert_allclose(a @ np.concatenate(w), best, atol=2e-2)


@pytest.mark.parametrize("target", ["attention", "loss"])
def test_a_fit_holds_the_entries_asked_for_and_prefers_important_keys(model, target):
    cfg, params = model
    how = FitConfig(target=target, windows=2, calibration=2, entries=90)
    said = []
    fitted = dms_fit.fit(params, cfg, rows(8), how, said.append)
    assert len(said) == (7 if cfg.memory.shared else 5)
    batch = next(rows(1))
    _, _, aux = transformer.hidden(fitted, batch, cfg=cfg)
    assert 70 < aux["occupancy"].mean() < 110
    y = dms_fit.targets(params, batch, jax.random.key(0), cfg=cfg, target=target)
    far = slice(cfg.memory.sinks, T - WINDOW - ridge.LEAST_QUERIES)
    evict, y = np.asarray(aux["evict"])[..., far], np.asarray(y)[..., far]
    assert y[~evict].mean() > y[evict].mean()
    assert fitted["embed"] is params["embed"]


def test_the_threshold_alone_can_be_moved(model):
    cfg, params = model
    how = FitConfig(target="attention", windows=2, calibration=2, entries=90)
    fitted = dms_fit.fit(params, cfg, rows(8), how, lambda line: None)
    less = dms_fit.fit(fitted, cfg, rows(6), dataclasses.replace(how, windows=0, entries=40), lambda line: None)
    old, new = (p["layers"]["attn"]["dms"] for p in (fitted, less))
    np.testing.assert_array_equal(old["alpha"], new["alpha"])
    moves = np.asarray(new["bias"] - old["bias"])
    assert moves.min() > 0 and np.ptp(moves) < 1e-5


def test_with_slopes_the_same_share_stays_of_short_and_of_long_rows(model):
    cfg, params = model
    how = FitConfig(target="attention", windows=2, calibration=2, entries=90)
    fitted = dms_fit.fit(params, cfg, rows(8), how, lambda line: None)
    sloped = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, beyond=64))
    fitted = ridge.learned(fitted, sloped, {"slope": jnp.zeros((2, 2))})
    how = dataclasses.replace(how, windows=0, entries=140)
    more = dms_fit.fit(fitted, sloped, rows(12), how, lambda line: None)
    old, new = (p["layers"]["attn"]["dms"] for p in (fitted, more))
    for name in ("slope", "bias"):
        moves = np.asarray(new[name] - old[name])
        assert np.abs(moves).min() > 0 and np.ptp(moves) < 1e-5
    batch = next(rows(1))
    for t in (64, T):
        part = Batch(*(x[:, :t] for x in (batch.ids, batch.positions, batch.segments)))
        held = transformer.hidden(more, part, cfg=sloped)[2]["occupancy"]
        assert abs(held.mean() - t * 140 / T) < 0.1 * t


def test_what_no_slope_moves_may_be_too_much():
    with pytest.raises(AtomError, match=r"fit\.entries: 50% .* but 88% of the keys stay for which no slope counts"):
        ridge._move(-np.ones((2, 8)), np.array([0.0] * 7 + [1.0]), 0.5)


@pytest.mark.parametrize("entries", [WINDOW, T + 1])
def test_impossible_numbers_of_entries_are_refused(model, entries):
    cfg, params = model
    with pytest.raises(AtomError, match=r"fit\.entries"):
        dms_fit.calibrate(params, cfg, rows(2), FitConfig(calibration=1, entries=entries), lambda line: None)


def test_models_without_a_projection_and_short_rows_are_refused(model):
    cfg, params = model
    borrowed = dataclasses.replace(cfg, memory=DMS(form="borrowed"))
    with pytest.raises(AtomError, match="adapter or observed"):
        dms_fit.fit(params, borrowed, rows(1), FitConfig())
    with pytest.raises(AtomError, match="multiple of 128"):
        dms_fit.fit(params, cfg, iter([whole(jnp.zeros((1, 100), jnp.int32))]), FitConfig())
    with pytest.raises(AtomError, match=r"fit\.target"):
        FitConfig(target="size")


def test_documents_of_one_row_are_fitted_as_in_rows_of_their_own(model):
    cfg, params = model
    lengths = (160, 90, 6)
    ids = jax.random.randint(jax.random.key(4), (1, T), 0, 40)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None]
    packed = Batch(ids, jnp.concatenate([jnp.arange(n) for n in lengths])[None], segments)
    starts = np.cumsum([0, *lengths])
    alone = []
    for start, n in zip(starts, lengths):
        own = jnp.pad(ids[:, start : start + n], ((0, 0), (0, T - n)))
        alone.append(whole(own).replace(segments=(jnp.arange(T) < n)[None].astype(jnp.int32)))
    key = jax.random.key(0)
    y = dms_fit.targets(params, packed, key, cfg=cfg, target="attention")
    got = dms_fit._sums(params, packed, y, cfg=cfg)
    parts = [
        dms_fit._sums(params, one, dms_fit.targets(params, one, key, cfg=cfg, target="attention"), cfg=cfg)
        for one in alone
    ]
    wanted = jax.tree.map(lambda *x: sum(x), *parts)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-4, atol=2e-3)
    held = [ridge._logits(params, one, cfg=cfg)[1] for one in alone]
    np.testing.assert_allclose(ridge._logits(params, packed, cfg=cfg)[1], sum(held))


@pytest.mark.parametrize("model", ["shared"], indirect=True)
def test_what_layers_tell_predicts_the_mean_target_from_below(model):
    cfg, params = model
    batch = next(rows(1))
    y = dms_fit.targets(params, batch, jax.random.key(0), cfg=cfg, target="attention")
    told = dms_fit.tells(jax.device_get(dms_fit._joint_sums(params, batch, y, cfg=cfg)), cfg, 1e-9)
    probe = lambda p, heads, call: observed.observe(call.q, call.k, call.tokens, WINDOW)  # noqa: E731
    o = np.asarray(transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"])[:, 0]
    used = slice(cfg.memory.sinks, T - WINDOW - ridge.LEAST_QUERIES)
    o, mean = o[:, :, used], np.asarray(y)[:, 0, :, used].mean((0, 1))
    found = np.einsum("lhtf,lfhc->ltc", np.concatenate([o, np.ones_like(o[..., :1])], axis=-1), told)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-4)
    assert not told[1, ..., 0].any()
    for channel, layers in ((0, 1), (1, 2)):
        columns = o[:layers].transpose(2, 0, 1, 3).reshape(len(mean), -1)
        columns = np.concatenate([columns, np.ones_like(columns[:, :1])], axis=1)
        best = columns @ np.linalg.lstsq(columns, mean, rcond=None)[0]
        np.testing.assert_allclose(found[..., channel].sum(0) + mean.mean(), best, atol=2e-2)
