"""Merging fitted in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens
from atom_jax.transfer import dmc_fit, ridge
from atom_jax.transfer.ridge import FitConfig
from atom_jax.typing import AtomError, Batch

T = 256
HOW = FitConfig(target="output", windows=2, calibration=1, entries=120)


ADAPTER = DMC("adapter", scale=2.0, offset=0.5, bias=True, sinks=2, mass=True, turned=True)
OBSERVED = dataclasses.replace(ADAPTER, form="observed", window=16)
EITHER = dataclasses.replace(OBSERVED, evicts=True)


@pytest.fixture(scope="module", params=[ADAPTER, OBSERVED, EITHER], ids=["adapter", "observed", "either"])
def model(request):
    memory = request.param
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


FORMS = {
    "ours": DMC(mass=True, turned=True), "published": DMC(), "window": DMC(mass=True, turned=True, window=9)
}  # fmt: skip


@pytest.mark.parametrize("dmc", FORMS.values(), ids=list(FORMS))
def test_costs_are_the_errors_of_single_merges(dmc):
    rng, (h, g, t, size, d) = np.random.default_rng(0), (2, 2, 128, 8, 16)
    q, k, v, o = (rng.normal(size=s) for s in ((h, g, t, size), (h, t, size), (h, t, size), (h, g, size, d)))
    place = jnp.arange(t, dtype=jnp.int32)[None]
    cos, sin = (x[:, None, :, 0] for x in rope.tables(place, size, 1e4))
    turned = np.asarray(rope.rotate(jnp.asarray(k, jnp.float32)[None], cos, sin))[0]
    new = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    call = Call(new(q), new(turned), new(v), Tokens(place, place * 0 + 1), jnp.zeros(1, jnp.int32), k_plain=new(k))
    sizes = rng.uniform(1.0, 100.0, t)
    projection = jnp.asarray(o, jnp.float32).reshape(h * g, size, d)
    found, alone, weight = jax.jit(dmc_fit.costs, static_argnums=3)(call, projection, new(sizes), dmc)
    later, least = np.tril(np.ones((t, t), bool)), max(dmc.window, 1)

    def outputs(keys, bias, seen):
        scores = np.einsum("hgtk,hsk->hgts", q, keys) * size**-0.5 + bias
        p = np.exp(np.where(seen, scores, -np.inf))
        return p / np.maximum(p.sum(-1, keepdims=True), 1e-30)

    p = outputs(turned, 0.0, later)
    got = np.where(np.tril(later, -least), p, 0.0).sum((1, 2)) / np.maximum(t - least - np.arange(t), 1)
    np.testing.assert_allclose(weight[0], np.log(got + 1e-6), atol=1e-3)
    for i in (1, 17, 60, 120):
        share = ((got[:, i] + 1e-6) / (got[:, i] + got[:, i - 1] + 2e-6))[:, None]
        mean = [x[:, i - 1] + share * (x[:, i] - x[:, i - 1]) for x in (turned if dmc.turned else k, v)]
        here = [jnp.asarray(x)[:, :, i] for x in (cos, sin)]
        keys, values, bias = turned.copy(), v.copy(), np.zeros((h, 1, 1, t))
        keys[:, i] = mean[0] if dmc.turned else rope.rotate(jnp.asarray(mean[0], jnp.float32)[None], *here)[0]
        values[:, i] = mean[1]
        if dmc.mass:
            bias[:, 0, 0, i] = -(share * np.log(share) + (1 - share) * np.log(1 - share))[:, 0]
        merged = outputs(keys, bias, later & (np.arange(t) != i - 1))
        change = np.einsum("hgts,hsk->hgtk", merged, values) - np.einsum("hgts,hsk->hgtk", p, v)
        error = np.square(np.einsum("hgtk,hgkd->hgtd", change, o)).sum((1, 3)) / sizes
        expected = error[:, i + dmc.window :].sum(1)
        np.testing.assert_allclose(found[0, :, i], expected, rtol=2e-3)
        without = outputs(turned, 0.0, later & (np.arange(t) != i))
        change = np.einsum("hgts,hsk->hgtk", without - p, v)
        error = np.square(np.einsum("hgtk,hgkd->hgtd", change, o)).sum((1, 3)) / sizes
        expected = error[:, i + least :].sum(1)
        if dmc.window:
            np.testing.assert_allclose(alone[0, :, i], expected, rtol=2e-3)


def test_planted_weights_are_found():
    rng, (layers, heads, d) = np.random.default_rng(0), (2, 3, 5)
    x = np.concatenate([rng.normal(size=(layers, 400, d)), np.ones((layers, 400, 1))], axis=-1)
    w = rng.normal(size=(layers, heads, d + 1))
    y = np.einsum("ltd,lhd->lht", x, w)
    sums = {
        "xx": np.einsum("ltd,lte->lde", x, x), "xy": np.einsum("ltd,lht->lhd", x, y),
        "xo": np.zeros((layers, heads, d + 1, 0)), "oo": np.zeros((layers, heads, 0, 0)),
        "oy": np.zeros((layers, heads, 0)),
    }  # fmt: skip
    weights, constant, _ = ridge.solve(sums, 1e-9)
    np.testing.assert_allclose(weights.transpose(0, 2, 1), w[..., :-1], atol=1e-6)
    np.testing.assert_allclose(constant, w[..., -1], atol=1e-6)


def test_a_fit_holds_the_entries_asked_for_and_merges_what_costs_little(model):
    cfg, params = model
    said = []
    fitted = dmc_fit.fit(params, cfg, rows(5), HOW, said.append)
    assert len(said) == 5
    batch = next(rows(1))
    _, _, aux = transformer.hidden(fitted, batch, cfg=cfg)
    assert 100 < aux["occupancy"].mean() < 140

    def probe(p, heads, call):
        return dmc_fit.costs(call, p["o"], jnp.square(heads.x_btd).sum(-1), cfg.memory)[0]

    y = transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]
    # What is reported at a token is that the next one merges.
    merges = np.asarray(aux["evict"])[..., 3:180]
    y = np.log(np.asarray(y) + dmc_fit.ERROR_FLOOR)[..., 4:181]
    assert y[merges].mean() < y[~merges].mean()
    learned = fitted["layers"]["attn"]["dmc"]
    assert all(np.asarray(learned[name]).any() for name in learned)
    assert fitted["embed"] is params["embed"]


def test_other_models_and_targets_are_refused(model):
    cfg, params = model
    borrowed = dataclasses.replace(cfg, memory=DMC("borrowed"))
    with pytest.raises(AtomError, match="form adapter"):
        dmc_fit.fit(params, borrowed, rows(1), HOW)
    with pytest.raises(AtomError, match="fitted to output"):
        dmc_fit.fit(params, cfg, rows(1), FitConfig())
    with pytest.raises(AtomError, match=r"fit\.entries: 300 is impossible with .*documents of 256 tokens"):
        dmc_fit.calibrate(params, cfg, rows(1), dataclasses.replace(HOW, entries=300), lambda line: None)
