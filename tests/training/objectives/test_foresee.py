"""Training world models: what goes together, and what a run that a threshold is found for does."""

import dataclasses

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config
from atom_jax.chunking.rules import surprise
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.data import numbered
from atom_jax.data.config import DataConfig
from atom_jax.models.image_tokens import ImageTokensConfig
from atom_jax.training import loop, start
from atom_jax.training.objectives import Setting, foresee
from atom_jax.training.record import read
from atom_jax.typing import AtomError
from configs import world

DATA = DataConfig(sources=("env:watch",), seq_len=14, batch_size=4)


def rows(cfg, index=0, count=1):
    return world.FORESEE.rows(None, cfg, index, count)


def test_rows_are_numbered_on_from_where_they_were():
    data = rows(DATA)
    first, second = next(data), next(data)
    assert first["number"].tolist() == [1, 2, 3, 4] and second["number"].tolist() == [5, 6, 7, 8]
    assert not first["loss_mask"][:, -1].any() and first["loss_mask"][:, :-1].all()
    state = data.get_state()
    third = next(data)
    data.set_state(state)
    assert next(data)["number"].tolist() == third["number"].tolist()
    halves = [next(rows(DATA, i, 2))["number"].tolist() for i in (0, 1)]
    assert halves == [[1, 2], [3, 4]]
    other = rows(dataclasses.replace(DATA, sources=("env:watch:least=4",)))
    with pytest.raises(AtomError, match=r"data\.sources or their sizes have changed"):
        other.set_state(state)
    assert numbered.stream(DATA) != numbered.stream(DATA.held_out("validation", 4))


def test_a_threshold_leaves_as_many_as_it_is_to():
    nats = jax.random.exponential(jax.random.key(0), (1000,))
    assert float((nats > surprise.calibrated(nats, Surprise(target=5.0))).mean()) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("there", [None, ImageTokensConfig()])
def test_no_threshold_is_found_without_a_local_prediction(there, monkeypatch):
    exp = config.override(world.codes(), ["init_from=runs/before"])
    monkeypatch.setattr(foresee.checkpoint, "load_config", lambda path, adapter: (there, None))
    given = there and {"tokenizer": {}, "stage0": {}}
    params, (line,) = exp.objective.begin(Setting(exp, None, None), given, None, None)
    assert params is given
    assert line == "no local prediction is there to find 8 frames per unit with: a unit starts above 1 nats"


@pytest.mark.parametrize(
    "settings, words",
    [
        (["data.sources=austen"], "expected one world"),
        (["data.sources=env:watch,austen"], "goes with no other source"),
        (["data.sources=env:watch:size=7"], r"has a grid \(7, 7\)"),
        (["data.sources=env:nowhere"], "env 'nowhere'"),
        (["model.secrets=3"], "hides one of 4"),
        (["objective=none"], "next_token is about texts, but the model reads frames"),
    ],
)
def test_what_does_not_go_together(settings, words, tmp_path):
    exp = dataclasses.replace(config.override(world.tiny(), settings), first=None)
    with pytest.raises(AtomError, match=words):
        loop.fit(exp, tmp_path)


def test_texts_and_worlds_do_not_mix(tmp_path):
    text = config.load_file("configs/units.py:tiny")
    with pytest.raises(AtomError, match="model must be a WorldConfig"):
        loop.fit(dataclasses.replace(text, objective=world.FORESEE), tmp_path)
    with pytest.raises(AtomError, match="is a world, but next_token is about texts"):
        loop.fit(config.override(text, ["data.sources=env:watch"]), tmp_path)


def test_a_run_finds_its_threshold_and_is_loaded(tmp_path, one_device):
    exp = world.tiny()
    rule = Surprise(target=5.0)
    cfg = dataclasses.replace(exp.model, chunking=(dataclasses.replace(exp.model.chunking[0], rule=rule),))
    steps = ["train.steps=2", "train.eval_every=2", "train.eval_batches=1"]
    exp = dataclasses.replace(exp, model=cfg, first=dataclasses.replace(exp.first, model=cfg))
    exp = config.override(exp, [*steps, *(f"first.{s}" for s in steps)])
    result = loop.fit(exp, tmp_path / "run")
    assert 1.0 < result.validation["frames_per_unit_0"] < 14.0 and "bits_per_byte" not in result.validation
    said = {line["kind"]: line for line in read(tmp_path / "run" / "metrics.jsonl")}["train"]
    assert said["frames_per_second"] > 0 and "tokens_per_second" not in said
    lm = atom_jax.load(tmp_path / "run")
    assert lm.tokenizer is None and lm.config == exp.model and lm.family == "world"
    before, tau = atom_jax.load(tmp_path / "run" / "first"), lm.params["stage0"]["rule"]["tau"]
    assert float(tau) != 1.0 and float(before.params["stage0"]["rule"]["tau"]) == 1.0
    for name in ("cells", "inlet", "local"):
        same = jax.tree.map(np.array_equal, before.params[name], lm.params[name])
        assert all(jax.tree.leaves(same))
    assert not np.array_equal(before.params["head"]["gate"], lm.params["head"]["gate"])
    assert start.tokenizer(exp) is None
