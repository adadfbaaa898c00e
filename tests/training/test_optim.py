import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.models import transformer
from atom_jax.training import optim
from atom_jax.training.config import Group, OptimConfig
from atom_jax.typing import AtomError

CFG = transformer.TransformerConfig(
    family="qwen3", d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, tie_embeddings=False
)
SPEC = transformer.spec(CFG)


def schedule(kind: str, **fields):
    cfg = OptimConfig(learning_rate=1.0, schedule=kind, warmup_steps=10, final_fraction=0.1, **fields)
    return [float(optim.make_schedule(cfg, 100)(i)) for i in range(101)]


def test_schedules():
    for kind in ("cosine", "wsd", "constant"):
        rates = schedule(kind, decay_fraction=0.2)
        assert 0 < rates[0] < rates[5] < rates[10] == 1.0
        np.testing.assert_allclose(rates[100], 1.0 if kind == "constant" else 0.1, rtol=1e-6)
    rates = schedule("wsd", decay_fraction=0.2)
    assert rates[80] == 1.0 > rates[81]
    np.testing.assert_allclose(rates[90], 0.55, rtol=1e-6)
    np.testing.assert_allclose(schedule("cosine")[55], 0.55, rtol=1e-6)
    assert schedule("cosine", decay_fraction=0.0)[100] == schedule("cosine")[100]
    # A run shorter than its warm-up still has a rate.
    assert all(float(optim.make_schedule(OptimConfig(), 5)(i)) > 0 for i in range(5))


def test_matrices_are_found_by_their_axes():
    names = {k for k, s in params_lib.flatten(SPEC).items() if optim.is_matrix(s)}
    assert names == {f"layers/attn/{n}" for n in "qkvo"} | {f"layers/mlp/{n}" for n in ("gate", "up", "down")}


def test_muon_sides():
    flat = params_lib.flatten(SPEC)
    assert optim._muon_dims(flat["layers/attn/q"]) == ((1,), (2, 3))
    assert optim._muon_dims(flat["layers/attn/o"]) == ((3,), (1, 2))
    assert optim._muon_dims(flat["layers/mlp/down"]) == ((2,), (1,))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_only(kind):
    cfg = OptimConfig(optimizer=kind, learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1)
    optimizer = optim.make(cfg, SPEC, 10)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), SPEC, is_leaf=params_lib.is_spec)
    zero = jax.tree.map(jnp.zeros_like, params)
    new, _ = optimizer.update(zero, optimizer.transform.init(params), params, jnp.int32(0))
    for name, value in params_lib.flatten(new).items():
        expected = 0.95 if optim.is_matrix(params_lib.flatten(SPEC)[name]) else 1.0
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


def test_muon_updates_are_nearly_orthogonal():
    cfg = OptimConfig(optimizer="muon", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0)
    optimizer = optim.make(cfg, SPEC, 10)
    params = params_lib.init(jax.random.key(0), SPEC)
    grads = params_lib.init(jax.random.key(1), SPEC)
    new, _ = optimizer.update(grads, optimizer.transform.init(params), params, jnp.int32(0))
    for name, rows in (("attn/q", 16), ("attn/o", 32), ("mlp/down", 24)):
        part, _, leaf = name.partition("/")
        change = (new["layers"][part][leaf] - params["layers"][part][leaf])[1].reshape(rows, -1)
        values = np.linalg.svd(change, compute_uv=False) / (0.2 * max(change.shape) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.3


def test_groups_scale_and_freeze():
    groups = (Group("layers/attn/.*", 0.5), Group("layers/.*", 0.0), Group("embed", 0.0))
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    params = params_lib.init(jax.random.key(0), SPEC)

    def change(cfg):
        optimizer = optim.make(cfg, SPEC, 10)
        learn, frozen = optimizer.split(params)
        state = optimizer.transform.init(learn)
        chex.assert_trees_all_equal(optim.merge(learn, frozen), params)
        new, state = optimizer.update(jax.tree.map(jnp.ones_like, learn), state, learn, jnp.int32(0))
        return params_lib.flatten(jax.tree.map(jnp.subtract, new, learn)), state

    all_of_it, _ = change(cfg)
    some, state = change(dataclasses.replace(cfg, groups=groups))
    assert set(some) == {k for k in all_of_it if "attn/" in k} | {"norm", "unembed"}
    np.testing.assert_allclose(some["layers/attn/q"], 0.5 * all_of_it["layers/attn/q"], rtol=1e-6)
    np.testing.assert_allclose(some["norm"], all_of_it["norm"], rtol=1e-6)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * sum(x.size for x in some.values())


@pytest.mark.parametrize("pattern", ["layers/nothing", "layers/(", "attn"])
def test_groups_that_match_nothing_are_refused(pattern):
    with pytest.raises(AtomError, match="groups"):
        optim.make(OptimConfig(groups=(Group(pattern),)), SPEC, 10)


def test_everything_frozen_is_refused():
    with pytest.raises(AtomError, match="every parameter is frozen"):
        optim.make(OptimConfig(groups=(Group(".*"),)), SPEC, 10)


@pytest.mark.parametrize("field", [{"optimizer": "sgd"}, {"schedule": "step"}, {"accumulate": 0}, {"ema": 1.0}])
def test_unknown_choices_are_refused(field):
    with pytest.raises(AtomError, match=next(iter(field))):
        OptimConfig(**field)


def test_decay_can_follow_names():
    cfg = OptimConfig(weight_decay=1.0, decay_pattern=".*norm")
    optimizer = optim.make(cfg, SPEC, 10)
    ones = jax.tree.map(jnp.ones_like, params_lib.init(jax.random.key(0), SPEC))
    updates, _ = optimizer.transform.update(jax.tree.map(jnp.zeros_like, ones), optimizer.transform.init(ones), ones)
    moved = {name for name, u in params_lib.flatten(updates).items() if np.abs(u).max() > 0}
    assert moved == {name for name in params_lib.flatten(SPEC) if name.endswith("norm")}
    with pytest.raises(AtomError, match=r"optim\.decay_pattern: 'nothing' matches none"):
        optim.make(OptimConfig(decay_pattern="nothing"), SPEC, 10)
    with pytest.raises(AtomError, match="goes with adamw"):
        OptimConfig(optimizer="muon", decay_pattern=".*")
