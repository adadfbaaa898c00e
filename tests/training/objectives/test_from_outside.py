"""An objective from outside the package, registered by one call: it has parameters of its own, and every hook."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.aot import training as aot
from atom_jax.checkpoint import store
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.params import ParamSpec, flatten, normal
from atom_jax.training import loop, losses
from atom_jax.training.config import Experiment, Group
from atom_jax.training.objectives import OBJECTIVES, NextToken, register
from atom_jax.training.record import read
from tests.training.tiny import make


@dataclasses.dataclass(frozen=True)
class TwoAhead(NextToken):
    """The next token and, through a matrix of its own, the one after it, `weight` times."""

    weight: float = 0.5
    name = "two_ahead"
    pages = {"two_ahead": {"nats": {"second": ""}}}  # noqa: RUF012

    def extra_spec(self, cfg):
        return {"second": {"w": ParamSpec((cfg.d_model, cfg.d_model), ("embed", None), normal(0.1))}}

    def begin(self, setting, params, places, data):
        assert next(data)["ids"].shape == (setting.exp.data.batch_size, setting.exp.data.seq_len)
        return params, ["looks two ahead"]

    def counts(self, batch, setting):
        return {"far": jnp.sum(self.far(batch)), "targets": jnp.sum(batch.loss_mask)}

    def far(self, batch):
        return batch.loss_mask & jnp.pad(batch.loss_mask[:, 1:], ((0, 0), (0, 1)))

    def loss(self, params, batch, key, step, *, setting, counts=None):
        near, model, cfg = super().loss(params, batch, key, step, setting=setting), *self.model(setting)
        x_btd, _, _ = model.hidden(params, batch, cfg=cfg)
        head = functools.partial(model.logits, params, cfg=cfg)
        nats = scoring.score(head, x_btd @ params["second"]["w"], jnp.roll(batch.targets, -1, axis=1))["nats"]
        far, own = jnp.sum(nats * self.far(batch)), self.counts(batch, setting)
        whole = own if counts is None else counts
        objective = near.objective + self.weight * far / whole["far"] * whole["targets"]
        return near.replace(objective=objective, learned=near.learned | {"second": jnp.stack([far, own["far"]])})

    def model(self, setting):
        return registry.of(setting.exp.model), setting.exp.model

    def reference(self, setting, batches):
        total = [losses.counted_bytes(setting.lengths, batch) for batch in batches()]
        return {"uniform_bits_per_byte": 8.0, "reference_bytes": float(sum(total))}

    def finish(self, setting, params, data):
        return params | {"norm": params["norm"] + 1.0}

    def operations(self, setting, factors):
        needed, again = super().operations(setting, factors)
        return 2 * needed, again


@pytest.fixture(autouse=True, scope="module")
def registered():
    register(TwoAhead)
    yield
    OBJECTIVES.pop("two_ahead")


def experiment(*settings, **fields):
    plain = ["mesh.data=8", "train.steps=4", "train.eval_every=2", "train.checkpoint_every=2", "optim.ema=0.5"]
    return make(*plain, "optim.schedule=constant", *settings, objective=TwoAhead(), **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, curves):
    workdir = tmp_path_factory.mktemp("whole")
    with curves():
        return workdir, loop.fit(experiment(), workdir)


def test_a_run(whole):
    workdir, result = whole
    lines = read(workdir / "metrics.jsonl")
    train = [x for x in lines if x["kind"] == "train"]
    assert train[-1]["second"] < train[0]["second"] and train[-1]["loss"] < train[0]["loss"]
    assert result.validation["uniform_bits_per_byte"] == 8.0
    assert {x["reference_bytes"] for x in lines if x["kind"] == "validation"} == {2 * 8 * 32.0}
    assert (workdir / "plots" / "two_ahead.png").exists()
    saved = json.loads((workdir / "experiment.json").read_text())
    assert saved["objective"] == {"class": "TwoAhead", "hard": False, "focus": 0.0, "weight": 0.5}
    assert config.from_json(Experiment, saved) == experiment()


def test_its_parameters_lie_beside_the_models(whole):
    workdir, _ = whole
    step = workdir / "checkpoints" / "4"
    assert (step / "second").is_dir() and "second" not in atom_jax.load(workdir).params
    # Whoever only reads the model needs no objective.
    kept = OBJECTIVES.pop("two_ahead")
    try:
        assert flatten(atom_jax.load(step).params).keys() == flatten(atom_jax.load(workdir).params).keys()
    finally:
        OBJECTIVES["two_ahead"] = kept


def own(workdir, step=4):
    """The objective's own parameters in a checkpoint."""
    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    return store._restore(workdir / "checkpoints" / str(step) / "second", {"w": shape})["w"]


def test_stopped_and_continued_equals_uninterrupted(whole, tmp_path, stop_after):
    stop_after(1)
    ends = [loop.fit(experiment(), tmp_path) for _ in range(2)]
    assert [r.step for r in ends] == [1, 4] and ends[1].validation == whole[1].validation
    chex.assert_trees_all_equal(atom_jax.load(tmp_path).params, atom_jax.load(whole[0]).params)
    chex.assert_trees_all_equal(own(tmp_path), own(whole[0]))
    # What was done after the last step is in the average that is used.
    np.testing.assert_allclose(np.mean(atom_jax.load(tmp_path).params["norm"]), 2.0, atol=0.05)


def test_absent_parameters_are_drawn_and_may_be_frozen(whole, tmp_path):
    exp = experiment(init_from=str(whole[0]), seed=9)
    exp = dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=(Group("second/.*"),)))
    assert loop.fit(exp, tmp_path).step == 4
    # Compiled, as the run does it: operations one by one round otherwise.
    drawn = jax.jit(lambda key: params.init(key, TwoAhead().extra_spec(exp.model)))(jax.random.key(9))
    chex.assert_trees_all_equal(own(tmp_path), drawn["second"]["w"])


def test_compile_only():
    plain, ours = aot.check(make("mesh.data=8"), "cpu:8"), aot.check(experiment(), "cpu:8")
    assert ours.needed == 2 * plain.needed and ours.count == plain.count + 32 * 32


def test_settings():
    exp = config.override(experiment(), ["objective.weight=0.25"])
    assert exp.objectives == (TwoAhead(weight=0.25),)
    assert config.override(exp, ["objective=none"]).objectives == (NextToken(),)
