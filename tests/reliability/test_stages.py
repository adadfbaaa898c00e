"""Runs in stages, and checkpoints that hold more than a model: what is wrong with any of it is said."""

import shutil

import pytest

from atom_jax.checkpoint import checksums
from atom_jax.checkpoint.steps import steps
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.training import loop, start
from atom_jax.typing import AtomError
from tests.reliability.test_store_damage import flip, largest
from tests.training.test_loop import experiment

SETTINGS = ("mesh.data=1", "train.checkpoint_every=1", "train.eval_every=0", "train.keep=5", "optim.ema=0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    home = tmp_path_factory.mktemp("averaged")
    loop.fit(experiment(*SETTINGS, "train.steps=2"), home / "run")
    return home / "run"


def test_a_fresh_checkpoint_is_what_was_written(run):
    assert checksums.verify(run / "checkpoints" / "2") > 0


@pytest.mark.parametrize("damage", [lambda p: flip(largest(p)), shutil.rmtree], ids=["flipped", "missing"])
def test_a_damaged_average_is_not_used(run, tmp_path, damage, capfd):
    mine = shutil.copytree(run, tmp_path / "run")
    damage(mine / "checkpoints" / "2" / "ema")
    loop.fit(experiment(*SETTINGS, "train.steps=2"), mine)
    assert "the checkpoint of step 2 is not used, step 1 is" in capfd.readouterr().err
    assert steps(mine / "checkpoints") == [2, 1] and (mine / "checkpoints" / "2.damaged").is_dir()


def test_init_from_beside_a_first_stage(tmp_path):
    exp = start.configure("configs/world.py:tiny", ["init_from=somewhere"])
    with pytest.raises(AtomError, match="init_from is somewhere, but this run starts from the result of `first`"):
        loop.fit(exp, tmp_path / "run")


@pytest.mark.parametrize(
    "setting, message", [("data.sources=austen", "expected one world"), ("data.sources=env:video", r"model\.port")]
)
def test_a_later_stage_is_looked_at_first(tmp_path, setting, message):
    exp = start.configure("configs/world.py:tiny", [setting])
    with pytest.raises(AtomError, match=message):
        loop.fit(exp, tmp_path / "run")
    assert not (tmp_path / "run" / "first").exists()


def test_rows_longer_than_the_model(tmp_path):
    with pytest.raises(AtomError, match=r"data\.seq_len .* is beyond the model's"):
        loop.fit(experiment("model.max_length=8", "mesh.data=-1"), tmp_path / "run")


def test_settings_of_an_evaluation_that_fill_the_memory():
    with pytest.raises(AtomError, match="batch_tokens"):
        EvalConfig(batch_tokens=10**9)
