"""Training runs that are disturbed: damaged checkpoints, changed texts, second runs, steps that go wrong."""

import shutil

import jax
import numpy as np
import pytest

from atom_jax.checkpoint import lock, store
from atom_jax.checkpoint.steps import is_suspect, steps
from atom_jax.training import loop
from atom_jax.typing import AtomError
from tests.reliability.test_store_damage import flip, largest
from tests.training.test_loop import experiment, losses_of

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 80
SETTINGS = ("mesh.data=1", "train.steps=6", "train.checkpoint_every=2", "train.eval_every=0", "train.keep=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """(directory of a text, WORKDIR of a whole run on it)."""
    home = tmp_path_factory.mktemp("home")
    (home / "a.txt").write_text(TEXT)
    loop.fit(experiment(*SETTINGS, f"data.sources={home}/a.txt"), home / "run")
    return home, home / "run"


@pytest.fixture
def mine(run, tmp_path):
    shutil.copy(run[0] / "a.txt", tmp_path / "a.txt")
    return shutil.copytree(run[1], tmp_path / "run")


def fit(workdir, *settings, source=None):
    source = source or workdir.parent / "a.txt"
    return loop.fit(experiment(*SETTINGS, f"data.sources={source}", *settings), workdir)


def test_a_run_goes_on_from_the_newest_intact_step(run, mine, capfd):
    flip(largest(mine / "checkpoints" / "6" / "params"))
    fit(mine)
    assert "the checkpoint of step 6 is not used, step 4 is" in capfd.readouterr().err
    assert losses_of(mine) == losses_of(run[1])
    for a, b in zip(*(jax.tree.leaves(store.load_params(w)[1]) for w in (run[1], mine))):
        np.testing.assert_array_equal(a, b)
    assert steps(mine / "checkpoints") == [6, 4, 2] and (mine / "checkpoints" / "6.damaged").is_dir()


def test_a_second_run_in_the_same_directory_is_refused(mine):
    with lock.locked(mine), pytest.raises(AtomError, match="belongs to another run"):
        fit(mine)


def test_the_text_counts_and_not_its_name(mine):
    shutil.copy(mine.parent / "a.txt", mine.parent / "b.txt")
    fit(mine, "train.steps=7", source=f"{mine.parent}/./b.txt")
    (mine.parent / "a.txt").write_text(TEXT.replace("wife", "life"))
    with pytest.raises(AtomError, match=r"the text of .*a\.txt is not the one that this run began with"):
        fit(mine, "train.steps=8")


def test_the_learning_rate_may_change(mine, capfd):
    fit(mine, "train.steps=8", "optim.learning_rate=1e-4", "optim.clip_norm=0.5")
    said = capfd.readouterr().err
    assert "changed: optim.learning_rate: 0.003 -> 0.0001" in said and "so the learning rate after step 6 is" in said


def test_lines_that_are_no_metrics_do_no_harm(mine):
    with (mine / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n[]\n{"step": "x", "kind": 3}\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    fit(mine, "train.steps=7")
    assert len(losses_of(mine)) == 7


def test_a_streak_of_bad_steps_keeps_the_last_good_checkpoint(tmp_path, one_device):
    (tmp_path / "a.txt").write_text(TEXT)
    settings = ("optim.learning_rate=1e6", "optim.warmup_steps=0", "train.max_bad_steps=8", "train.keep=1")
    with pytest.raises(AtomError, match="8 steps in a row"):
        fit(tmp_path / "run", "train.steps=30", "train.checkpoint_every=1", *settings)
    kept = steps(tmp_path / "run" / "checkpoints")
    assert [is_suspect(tmp_path / "run" / "checkpoints" / str(step)) for step in kept] == [True, False]
    assert len(kept) == 2 and kept[0] > 4 and kept[1] < 4
