"""Models that come with the package: they are what was measured, and are found by their names."""

import jax
import pytest

import atom_jax
from atom_jax import checkpoint
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.data import puzzles
from atom_jax.evaluation.tasks import hyper_steps
from atom_jax.typing import AtomError

NAME = "reason-subset"


@pytest.fixture(scope="module")
def lm():
    return atom_jax.load(NAME)


def test_every_one_has_checksums_and_a_card():
    assert NAME in checkpoint.shipped()
    for name in checkpoint.shipped():
        source = SafetensorsSource(checkpoint.SHIPPED / name)
        assert set(source.crcs) == set(source.infos)
        assert (checkpoint.SHIPPED / name / "README.md").read_text("utf-8").startswith(f"# {name}\n")


def test_what_lies_there_goes_first(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert not checkpoint.find(NAME).is_absolute()
    with pytest.raises(AtomError, match=f"did you mean {NAME}"):
        checkpoint.find(f"{NAME}s")


def test_the_reasoner_takes_the_right_steps(lm):
    found = hyper_steps.judge(lm, puzzles.parse("subset:least=8"), 8)
    assert min(share for kind, share in found.items() if kind != "chain") > 0.99


def test_the_reasoner_reasons(lm):
    puzzle = puzzles.parse("subset:least=5:letters=5")
    problems = [puzzles.Generated(puzzle, "test").pose(i)[0] for i in range(4)]
    found = atom_jax.reason(
        lm, [puzzle.prompt(p) for p in problems], chains=4, max_new_tokens=160, min_p=0.2, key=jax.random.key(0),
        extract=puzzle.answer,
    )  # fmt: skip
    right = [answer is not None and puzzle.solves(p, answer) for p, answer in zip(problems, found.answers)]
    assert sum(right) >= 3
