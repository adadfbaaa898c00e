"""Commands and tasks about worlds, with a small model of random parameters."""

import json

import jax
import pytest
from PIL import Image

from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.checkpoint import store
from atom_jax.evaluation import run
from atom_jax.evaluation.tasks import EvalConfig
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
    again = planned(lm, PlanSettings(planner="mpc:inner=shooting:n=3,horizon=2", episodes=6, **SMALL))
    assert again["futures"] == 6 and again["main_steps_decision"] <= 1


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
    with pytest.raises(AtomError, match="bpb: this task is not for world models"):
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
        (["imagine", good, "--actions=7"], "--actions: watch has actions 0 to 3"),
        (["imagine", good, "--actions=a"], "expected numbers of actions"),
        (["generate", good, "--prompt=x"], "world model"),
        (["units", good, "--text=x"], "world model"),
        (["units", good, "--episode=watch", "--text=x"], "leave out --text"),
        (["eval", good, "--tasks=plan", "--set=plan.episodes=0"], "episodes"),
    ):
        assert main(["", *wrong]) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, (wrong, error)
