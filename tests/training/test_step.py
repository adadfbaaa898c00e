import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.training import state as state_lib
from atom_jax.training.config import Group, OptimConfig
from tests.training.tiny import batches, make, mesh, program


@functools.cache
def run(*settings: str):
    """States and metrics on the host after every one of ten steps."""
    return follow(make(*settings), 10)


def follow(exp, n: int):
    with jax.set_mesh(mesh(exp.mesh)):
        p = program(exp)
        state, out = p.initial(), []
        for batch in batches(exp, n):
            state, metrics = p.step(state, p.put(batch))
            out.append(jax.device_get((state, metrics)))
        return out


def test_accumulation_equals_the_large_batch():
    whole, cut = run("optim.optimizer=adamw"), run("optim.accumulate=4")
    for (_, m), (_, n) in zip(whole[:3], cut[:3]):
        chex.assert_trees_all_close(m, n, rtol=1e-4)
    # After one step Adam's first moment is a tenth of the gradient.
    chex.assert_trees_all_close(whole[0][0].opt, cut[0][0].opt, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_loss_falls(kind):
    out = run(f"optim.optimizer={kind}")
    losses = [m["loss"] for _, m in out]
    # Eight equally likely bytes of 264.
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.5
    assert [int(s.step) for s, _ in out] == list(range(1, 11))


def test_metrics():
    exp = make()
    _, m = run("optim.optimizer=adamw")[0]
    mask = batches(exp, 1)[0]["loss_mask"]
    assert m["tokens"] == m["bytes"] == mask.sum() and m["bad"] == 0
    np.testing.assert_allclose(m["bits_per_byte"], m["loss"] / np.log(2), rtol=1e-6)
    assert m["grad_norm"] > 0 and 0 < m["learning_rate"] < exp.optim.learning_rate


def test_frozen_parameters_stay_bit_identical():
    groups = (Group("embed"), Group("layers/mlp/.*"))
    exp = make(optim=OptimConfig(learning_rate=0.01, warmup_steps=1, groups=groups))
    with jax.set_mesh(mesh(exp.mesh)):
        start = jax.device_get(program(exp).initial()).params
    state = follow(exp, 3)[-1][0]
    a, b = params_lib.flatten(start), params_lib.flatten(state.params)
    for name in a:
        same = np.array_equal(a[name], b[name])
        assert same == (name == "embed" or name.startswith("layers/mlp/")), name
    moments = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(state.opt)}
    assert not any("mlp/" in name or name.endswith("embed") for name in moments)


def test_a_gradient_that_is_not_finite_changes_nothing():
    exp = make("optim.ema=0.5")
    with jax.set_mesh(mesh(exp.mesh)):
        p = program(exp)
        good, (batch, *_) = p.initial(), batches(exp, 2)
        good, _ = p.step(good, p.put(batch))
        kept = jax.device_get(good)
        poisoned = good.replace(params=good.params | {"norm": good.params["norm"] * jnp.nan})
        bad, metrics = p.step(poisoned, p.put(batch))
        assert metrics["bad"] == 1 and bad.bad == 1 and bad.step == 2 and np.isnan(metrics["loss"])
        chex.assert_trees_all_equal(jax.device_get(bad.opt), kept.opt)
        chex.assert_trees_all_equal(jax.device_get(bad.ema), kept.ema)
        healed, metrics = p.step(bad.replace(params=jax.device_put(kept.params)), p.put(batch))
        assert metrics["bad"] == 0 and healed.bad == 0 and np.isfinite(metrics["loss"])


def test_moving_average():
    first, second = (s for s, _ in run("optim.ema=0.5")[:2])
    # The decay starts at 1 / 10 and would reach 0.5 after eight steps.
    expected = jax.tree.map(lambda a, p: 2 / 11 * a + 9 / 11 * p, first.ema, second.params)
    chex.assert_trees_all_close(second.ema, expected, rtol=1e-5, atol=1e-7)


def test_one_trace_for_many_steps(monkeypatch):
    exp = make()
    from atom_jax.training import losses

    counted = chex.assert_max_traces(n=1)(losses.next_token)
    monkeypatch.setattr(losses, "next_token", counted)
    follow(exp, 4)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("adamw", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
        ("muon", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
        ("adamw", ("mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2")),
    ],
)
def test_eight_devices_equal_one(kind, sizes):
    one = run(f"optim.optimizer={kind}")
    many = run(f"optim.optimizer={kind}", *sizes)
    np.testing.assert_allclose([m["loss"] for _, m in one], [m["loss"] for _, m in many], rtol=2e-5)
    np.testing.assert_allclose([m["grad_norm"] for _, m in one], [m["grad_norm"] for _, m in many], rtol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(kind):
    exp = make(f"optim.optimizer={kind}", "optim.ema=0.9", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    with jax.set_mesh(mesh(exp.mesh)):
        p = program(exp)
    flat = params_lib.flatten(p.state.params)
    assert flat["layers/attn/q"].sharding.spec == jax.P(None, "fsdp", "tensor", None)
    leaves = jax.tree.leaves_with_path((p.state.opt, p.state.ema))
    moments = 0
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for k, param in flat.items():
            if name.endswith("/" + k) and leaf.shape:
                assert leaf.sharding == param.sharding, name
                moments += 1
    matrices = 7
    assert moments == (3 * len(flat) if kind == "adamw" else 3 * len(flat) - matrices)
    assert isinstance(state_lib.shardings(p.state), state_lib.State)


def test_marks_reach_the_model_only_where_there_are_some():
    exp = make("data.marks=unigram:300")
    with jax.set_mesh(mesh(exp.mesh)):
        p = program(exp)
        rows = batches(exp, 1)[0]
        assert p.put(rows).marks is None
        marks = np.arange(rows["ids"].size).reshape(rows["ids"].shape) % 3 == 0
        put = p.put(rows | {"marks": marks})
        np.testing.assert_array_equal(put.marks, marks)
        chex.assert_trees_all_equal_shapes_and_dtypes(put, p.abstract_batch())
        p.step(p.initial(), put)
    with jax.set_mesh(mesh(make().mesh)):
        assert program(make()).abstract_batch().marks is None
