"""Commands and tasks about worlds, with a small model of random parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.checkpoint import store
from atom_jax.evaluation import run
from atom_jax.evaluation.reports import worlds
from atom_jax.evaluation.tasks import EvalConfig, plan
from atom_jax.evaluation.tasks.frames import FrameSettings
from atom_jax.evaluation.tasks.plan import PlanSettings, interval, planned
from atom_jax.models import registry
from atom_jax.typing import LM, AtomError
from configs import world

SMALL = {"env": "watch", "length": 5, "seed": 1}


@pytest.fixture(scope="module")
def lm():
    cfg = world.tiny().model
    return LM(cfg, params.init(jax.random.key(2), registry.of(cfg).spec(cfg)), None)


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "model"
    store.save_model(path, lm)
    return str(path)


def test_what_plans_come_to(lm):
    found = planned(lm, PlanSettings(planner="shooting:n=3,horizon=2", episodes=6, **SMALL))
    names = {"success", "interval", "ceiling", "wrong", "main_steps_watch", "main_steps_imagined", "units", "seconds"}
    assert names <= set(found) and json.loads(json.dumps(found)) == found
    # Untrained, every frame is a surprise: the five of the watch, the real one at the end, and those imagined.
    assert found["main_steps_watch"] == found["units"] == 5 and found["main_steps_decision"] == 1
    assert 0 <= found["main_steps_imagined"] <= 1 and found["futures"] == 3
    assert found["success"] + found["wrong"] <= 1 and found["success"] <= found["ceiling"] + 1e-6
    low, high = found["interval"]
    assert low <= found["success"] <= high
    asked = PlanSettings(planner="mpc:every=2,inner=shooting:n=3,horizon=3", episodes=6, **SMALL)
    again = planned(lm, asked)
    assert again["futures"] == 6 and again["main_steps_decision"] <= 1
    # Four steps are played, more than one plan has.
    env, frames = plan.world_of(asked)
    last = plan.episodes(env, jax.random.fold_in(jax.random.key(asked.seed), 0), 6, frames + 1)[1]
    ways = jax.jit(jax.vmap(lambda state: env.way(state, 4).steps))(last)
    assert again["ceiling"] == pytest.approx(float((ways >= 0).mean()))


def test_units_that_end_are_shown_from_where_they_begin():
    cfg = dataclasses.replace(world.tiny().model, chunking=world.watch_fixed().model.chunking)
    lm = LM(cfg, params.init(jax.random.key(2), registry.of(cfg).spec(cfg)), None)
    found = worlds.seen(lm, "watch", 24)
    assert np.flatnonzero(found.begins).tolist() == [0, 10, 20] and found.surprise is None


def test_the_world_is_that_of_the_training_data(tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps(config.to_json(world.tiny())))
    found = run.resolve(EvalConfig(), str(tmp_path))
    assert found.plan.env == found.frames.env == "watch:least=4,most=6,flash=0.25"
    assert plan.world_of(PlanSettings())[0].name == "watch"


def test_an_interval_holds_what_it_is_of():
    assert interval(0.5, 100) == pytest.approx([0.404, 0.596], abs=1e-3)
    assert interval(0.0, 10)[0] == 0 and interval(1.0, 10)[1] == 1


def test_tasks_are_for_one_kind_of_model(lm):
    cfg = EvalConfig(
        plan=PlanSettings(planner="random:horizon=2", episodes=4, **SMALL),
        frames=FrameSettings(episodes=4, horizon=3, **SMALL),
    )
    found = run.evaluate(lm, ["plan", "frames"], cfg)
    assert 0 <= found["plan"].metrics["success"].value <= 1
    metrics = found["frames"].metrics
    # An untrained head corrects little.
    assert metrics["nats"].value == pytest.approx(metrics["local_nats"].value, rel=0.2)
    assert metrics["frames_per_unit"].value == 1 and metrics["imagined"].value <= metrics["step"].value + 0.5
    with pytest.raises(AtomError, match="bpb: this task is for models of texts, and this one reads frames"):
        run.evaluate(lm, ["bpb"], EvalConfig())


def test_the_commands(saved, tmp_path, capsys):
    good = f"--checkpoint={saved}"
    out = tmp_path / "plan.json"
    how = ["--planner=shooting:n=2,horizon=2", "--episodes=3", "--length=5", f"--out={out}"]
    assert main(["", "plan", good, *how, "--memory=tova:budget=2"]) == 0
    assert json.loads(out.read_text())["units"] <= 2 and "success" in capsys.readouterr().out
    for name in ("a.png", "a.gif"):
        draw = ["--actions=1,0", "--futures=2", "--length=5", f"--out={tmp_path / name}"]
        assert main(["", "imagine", good, *draw]) == 0
        assert Image.open(tmp_path / name).size[0] > 50
    assert "units in them" in capsys.readouterr().out
    assert main(["", "units", good, "--episode=watch", "--length=5", f"--out={tmp_path / 'u.png'}"]) == 0
    assert "frames per unit" in capsys.readouterr().out and (tmp_path / "u.png").exists()
    assert main(["", "info", saved]) == 0
    assert "8 classes in each of 5 x 5 cells, 4 actions" in capsys.readouterr().out
    for wrong, words in (
        (["plan", good, "--env=watch:size=7"], "env watch: it has frames of [7, 7]"),
        (["plan", good, "--length=1"], "a watch lasts at least 3 frames"),
        (["plan", good, "--memory=kvcompose:budget=4"], "kvcompose chooses once a prompt is read"),
        (["imagine", good, "--actions=7"], "--actions: watch has actions 0 to 3"),
        (["imagine", good, "--actions=a"], "expected numbers of actions"),
        (["generate", good, "--prompt=x"], "reads frames and no text"),
        (["units", good, "--text=x"], "reads frames and no text"),
        (["units", good, "--episode=watch", "--text=x"], "leave out --text"),
        (["eval", good, "--tasks=plan", "--set=plan.episodes=0"], "episodes"),
    ):
        assert main(["", *wrong]) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, (wrong, error)
