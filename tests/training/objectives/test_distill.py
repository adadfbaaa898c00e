"""Self-distillation next to the official losses and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.checkpoint import families
from atom_jax.kvcache import learned
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.training.objectives import distill
from atom_jax.typing import AtomError
from tests.kvcache.dms import tiny


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def case(request, golden):
    return tiny.load(golden / "dms" / request.param)


def sums(case, params, monkeypatch, tau, key=True, **how):
    cfg, _, io = case
    cfg = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, tau=tau))
    batch = tiny.batch(io["input_ids"])
    batch = batch.replace(targets=jnp.roll(batch.ids, -1, 1), loss_mask=jnp.ones(batch.ids.shape, bool))
    monkeypatch.setattr(learned, "logistic", lambda key, shape: jnp.asarray(io["train_noise"]))
    settings = distill.Distill(**{"cr_start": 8.0, "cr_end": 8.0, **how})
    lengths = np.ones(cfg.vocab_size, np.int32)
    drawn = jax.random.key(0) if key else None
    return distill.self_distillation(
        params, batch, drawn, jnp.int32(0), cfg=cfg, lengths=lengths, how=settings, block=7
    )


@pytest.mark.parametrize("tau", ["0.1", "20"])
def test_losses_and_gradients_equal_the_official_ones(case, monkeypatch, tau):
    cfg, params, io = case
    setting = f"noise_tau{tau}"

    def loss(params):
        out = sums(case, params, monkeypatch, float(tau))
        return out.objective / out.tokens, out

    grads, out = jax.grad(loss, has_aux=True)(params)
    kl, weight = out.learned["kl"]
    np.testing.assert_allclose(kl / weight, io[f"train_{setting}_distil_loss"], rtol=1e-4)
    np.testing.assert_allclose(
        out.objective / out.tokens, io[f"train_{setting}_distil_loss"] + io[f"train_{setting}_dms_loss_target0.875"],
        rtol=1e-4,
    )  # fmt: skip
    source = families.ExportSource(cfg, grads)
    names = [n for n in io if n.startswith(f"grad_{setting}/")]
    assert len(names) >= 4
    for name in names:
        theirs = io[name]
        mine = source.read(name.partition("/")[2])
        assert np.linalg.norm(mine - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def test_directions_and_validation(case, monkeypatch):
    params = case[1]
    values = {d: sums(case, params, monkeypatch, 0.1, direction=d).learned["kl"][0] for d in ("reverse", "forward")}
    both = sums(case, params, monkeypatch, 0.1, direction="both").learned["kl"][0]
    np.testing.assert_allclose(both, (values["reverse"] + values["forward"]) / 2, rtol=1e-5)
    hard = sums(case, params, monkeypatch, 0.1, key=False)
    np.testing.assert_allclose(hard.objective / hard.tokens, hard.learned["kl"][0] / hard.learned["kl"][1], rtol=1e-5)
    assert np.isfinite(hard.nats)


def test_answers_may_count_more(case):
    cfg, params, io = case
    batch = tiny.batch(io["input_ids"])
    batch = batch.replace(targets=jnp.roll(batch.ids, -1, 1), loss_mask=jnp.ones(batch.ids.shape, bool))
    many = jnp.where(jnp.arange(batch.ids.size).reshape(batch.ids.shape) % 7 == 3, 20.0, 1.0)
    how, lengths = distill.Distill(), np.ones(cfg.vocab_size, np.int32)

    @jax.jit
    def run(batch, whole=None):
        return distill.self_distillation(params, batch, cfg=cfg, lengths=lengths, how=how, whole=whole)

    weighted = batch.replace(loss_weights=many)
    plain, sums = run(batch), run(weighted)
    assert "weighted_kl" not in plain.learned and sums.tokens == plain.tokens and sums.nats == plain.nats
    for name in ("kl", "agreement", "held"):
        np.testing.assert_array_equal(sums.learned[name], plain.learned[name])
    # One target at a time gives the divergences that are averaged.
    each, places = [], np.argwhere(np.asarray(distill._compared(batch, cfg)))
    for b, t in places:
        only = np.zeros(batch.ids.shape, bool)
        only[b, t] = True
        each.append(float(run(batch.replace(loss_mask=only)).learned["kl"][0]))
    mean = np.average(each, weights=np.asarray(many)[tuple(places.T)])
    np.testing.assert_allclose(sums.objective / sums.tokens, mean, rtol=1e-4)
    np.testing.assert_allclose(sums.learned["weighted_kl"][0] / sums.learned["weighted_kl"][1], mean, rtol=1e-4)
    alike = run(batch.replace(loss_weights=jnp.full_like(many, 3.0)))
    np.testing.assert_allclose(alike.objective, plain.objective, rtol=1e-5)
    whole, rows = distill.counts(weighted, cfg), len(batch.ids)
    parts = [run(jax.tree.map(lambda x, i=i: x[i : i + 1], weighted), whole).objective for i in range(rows)]
    np.testing.assert_allclose(sum(parts), sums.objective, rtol=1e-4)


def test_no_divergence_before_the_borrowed_channel_fades(golden, monkeypatch):
    case = tiny.load(golden / "dms" / "borrowed_neuron")
    out = sums(case, case[1], monkeypatch, 0.1, fade_steps=10)
    assert abs(out.learned["kl"][0]) < 1e-3 and out.learned["evicted"][0] == 0


def test_the_target_rises_with_the_ratio():
    how = distill.Distill(cr_start=1.0, cr_end=16.0, cr_steps=510)
    np.testing.assert_allclose(how.target(238), 1 - 1 / 8)
    assert how.target(0) == 0 and how.target(5000) == how.target(510)


@pytest.mark.parametrize("field,value", [("direction", "up"), ("cr_end", 0.5), ("cr_steps", 0), ("fade_steps", -1)])
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(AtomError, match="distill"):
        distill.Distill(**{field: value})


def test_only_the_evictors_get_gradients_when_the_rest_is_frozen(golden):
    cfg, params, _ = tiny.load(golden / "dms" / "separate_alpha")
    from atom_jax.training import optim
    from atom_jax.training.config import Group, OptimConfig

    groups = (Group(r"(?!layers/attn/dms/).*"),)
    made = optim.make(OptimConfig(groups=groups), transformer.spec(cfg), 10)
    learn, _ = made.split(params)
    assert set(params_lib.flatten(learn)) == {"layers/attn/dms/alpha", "layers/attn/dms/norm"}


def test_merging_is_retrofitted_in_the_same_way():
    memory = DMC("adapter", scale=1.0, offset=1000.0, mass=True, bias=True)
    cfg = transformer.TransformerConfig(
        vocab_size=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, memory=memory
    )
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    batch = tiny.batch(np.random.default_rng(0).integers(0, 40, (2, 24)))
    batch = batch.replace(targets=jnp.roll(batch.ids, -1, 1), loss_mask=jnp.ones(batch.ids.shape, bool))
    how = distill.Distill(cr_start=4.0, cr_end=8.0, remat=False)

    @functools.partial(jax.jit, static_argnames="offset")
    def run(offset):
        changed = dataclasses.replace(cfg, memory=dataclasses.replace(memory, offset=offset))
        return distill.self_distillation(
            params, batch, jax.random.key(0), jnp.int32(0), cfg=changed, lengths=np.ones(40, np.int32), how=how
        )

    never, half = run(1000.0), run(0.0)
    assert abs(never.learned["kl"][0]) < 1e-3 and never.learned["evicted"][0] == 0
    np.testing.assert_allclose(never.objective / never.tokens, 1 - 1 / 4, atol=1e-4)
    share, held = (half.learned[name][0] / 2 for name in ("evicted", "held"))
    assert half.learned["kl"][0] > 0 and 0.3 < share < 0.7
    # What doesn't merge is held.
    np.testing.assert_allclose(held, 24 * (1 - share), rtol=1e-5)


def test_what_layers_tell_each_other_is_learned_through_the_layers_between():
    memory = DMS("observed", window=4, scale=1.0, offset=0.0, tau=0.5, bias=True, shared=2)
    cfg = transformer.TransformerConfig(
        vocab_size=40, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, memory=memory
    )
    params = params_lib.init(jax.random.key(0), transformer.spec(cfg))
    learned = params["layers"]["attn"]["dms"]
    hear = jnp.zeros_like(learned["hear"]).at[2].set(0.3)
    learned |= {"tell": jax.random.normal(jax.random.key(1), learned["tell"].shape) * 0.1, "hear": hear}
    batch = tiny.batch(np.random.default_rng(0).integers(0, 40, (2, 24)))
    batch = batch.replace(targets=jnp.roll(batch.ids, -1, 1), loss_mask=jnp.ones(batch.ids.shape, bool))
    how = distill.Distill(cr_start=4.0, cr_end=8.0)

    @jax.jit
    def loss(params):
        return distill.self_distillation(
            params, batch, jax.random.key(0), jnp.int32(0), cfg=cfg, lengths=np.ones(40, np.int32), how=how
        ).objective

    found = jax.grad(loss)(params)["layers"]["attn"]["dms"]
    # The lowest layer tells the highest, which alone listens.
    assert all(jnp.abs(found["tell"][i]).max() > 1e-6 for i in range(3)) and jnp.abs(found["hear"]).max() > 1e-4
