"""What every registered objective must do: build, step, add up over parts, stop and go on, compile without data."""

import contextlib
import dataclasses
import json
import pathlib
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config
from atom_jax.aot import training as aot
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.plan import make_plan
from atom_jax.chunking.types import PlanState
from atom_jax.kvcache import learned
from atom_jax.training import loop, start
from atom_jax.training.config import Experiment, check_resumable
from atom_jax.training.objectives import OBJECTIVES, Byteify, Distill, Fit, NextToken
from atom_jax.training.objectives.base import Objective, register
from atom_jax.training.program import Program
from atom_jax.transfer import byteify
from atom_jax.typing import AtomError
from tests.training.tiny import make, mesh

TRAINING = [name for name, cls in OBJECTIVES.items() if cls.trains]


@pytest.fixture
def compiled_once(monkeypatch):
    """Runs whose experiments differ in what they start from alone share their steps and validations."""
    known = {}

    def program(exp, mesh, tokenizer):
        made = Program(exp, mesh, tokenizer)
        same = json.dumps(config.to_json(dataclasses.replace(exp, init_from="", first=None)))
        made.step, made.evaluate = known.setdefault(same, (made.step, made.evaluate))
        return made

    monkeypatch.setattr(loop, "Program", program)


@contextlib.contextmanager
def opened(exp):
    """The program of an experiment on one device, and its first batch on the host."""
    exp = config.override(exp, ["mesh.data=1", "init_from="])
    with jax.set_mesh(mesh(exp.mesh)):
        program = Program(exp, mesh(exp.mesh), start.tokenizer(exp))
        with contextlib.closing(program.read(exp.data)) as data:
            yield program, next(data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_configuration_is_kept(example, name):
    exp = example(name)
    assert config.from_json(object, json.loads(json.dumps(config.to_json(exp)))) == exp
    assert name in {o.name for o in exp.objectives} and exp.objectives[-1].trains
    assert OBJECTIVES[name].__doc__


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_and_steps_are_known_without_data(example, name):
    for exp, _ in example(name).stages(pathlib.Path("nowhere")):
        with opened(exp) as (program, rows):
            chex.assert_trees_all_equal_shapes_and_dtypes(program.put(rows), program.abstract_batch())
        nothing = ["init_from=", *(["byteify.source="] if exp.byteify else [])]
        report = aot.check(config.override(exp, nothing), "cpu:8")
        assert report.fits and 0 < report.needed <= report.executed


@pytest.mark.parametrize("name", TRAINING)
def test_parts_of_a_batch_add_up(example, name, monkeypatch):
    """But for noise, which is drawn for every part."""
    monkeypatch.setattr(learned, "logistic", lambda key, shape: jnp.full(shape, 0.3))
    for exp, _ in example(name).stages(pathlib.Path("nowhere")):
        found = []
        for parts in (1, 4):
            with opened(config.override(exp, [f"optim.accumulate={parts}"])) as (program, rows):
                if not program.objective.spelled:
                    # Rows differ in what they contribute; spelled ones do so of themselves.
                    place = np.arange(rows["loss_mask"].shape[1])[None]
                    rows["loss_mask"] = rows["loss_mask"] & (place < 20 + 3 * np.arange(8)[:, None])
                state, metrics = program.step(program.initial(), program.put(rows))
                found.append(jax.device_get((state.opt, metrics)))
        (opt, metrics), (cut_opt, cut_metrics) = found
        chex.assert_trees_all_close(cut_metrics, metrics, rtol=1e-4)
        chex.assert_trees_all_close(cut_opt, opt, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stopped_and_continued_equals_uninterrupted(example, name, tmp_path, stop_after, curves, compiled_once):
    """In every stage, each of two steps."""
    exp = example(name)
    with curves():
        whole, stages = loop.fit(exp, tmp_path / "whole"), len(exp.stages(tmp_path))
    stop_after(*range(1, 2 * stages, 2))
    ends = [loop.fit(exp, tmp_path / "cut") for _ in range(stages + 1)]
    assert [(r.step, r.signal) for r in ends] == [*stages * [(1, signal.SIGTERM)], (2, 0)]
    assert ends[-1].validation == whole.validation and np.isfinite(whole.validation["loss"])
    chex.assert_trees_all_equal(*(atom_jax.load(tmp_path / run).params for run in ("whole", "cut")))


@pytest.mark.parametrize("capacity", [1.0, 0.2])
def test_what_the_means_of_byteification_are_over(example, capacity):
    (exp, _), _ = example("byteify").stages(pathlib.Path("nowhere"))
    exp = config.override(exp, [f"model.capacity={capacity}"])
    with opened(exp) as (program, rows):
        lesson = program.put(rows)
        counts = byteify.counts(lesson, exp.model)
    tokens = byteify.Tokens(lesson.bytes.positions, lesson.bytes.segments)
    b, t = lesson.marks.shape
    boundary, room = byteify.Boundary(lesson.marks), slots_for(t, exp.model.capacity)
    plan, _ = make_plan(boundary, tokens, room, PlanState.empty(b))
    assert counts["encoder"] == (plan.tokens.segments > 0).sum() > 0
    seen = byteify.Seen(None, tokens)
    decided = (tokens.segments > 0) & ~byteify.lookahead.last_of_document(seen)
    assert counts["boundary"] == decided.sum() == counts["cross_entropy"]


def test_what_a_run_pursues():
    exp = make()
    assert exp.objectives == (NextToken(),)
    both = dataclasses.replace(exp, fit=Fit(), distill=Distill())
    assert both.objectives == (Fit(), Distill())
    assert dataclasses.replace(exp, fit=Fit()).objectives == (Fit(), NextToken())
    with pytest.raises(AtomError, match="distill and byteify: a run has one loss"):
        dataclasses.replace(exp, distill=Distill(), byteify=Byteify())
    with pytest.raises(AtomError, match="fit: expected Fit"):
        dataclasses.replace(exp, fit=Distill())

    @dataclasses.dataclass(frozen=True)
    class Unknown(Objective):
        pass

    with pytest.raises(AtomError, match=r"objective: expected .*NextToken"):
        dataclasses.replace(exp, objective=Unknown())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"distill": Distill()}, "no learned evictors"),
        ({"byteify": Byteify()}, "tokenizer must be bolmo"),
        ({"objective": NextToken(), "data.tokens": 8}, "next_token does not read rows of subwords"),
    ],
)
def test_what_does_not_go_together(changes, words):
    settings = [f"{k}={v}" for k, v in changes.items() if "." in k]
    exp = make(*settings, **{k: v for k, v in changes.items() if "." not in k})
    with pytest.raises(AtomError, match=words), jax.set_mesh(mesh(exp.mesh)):
        Program(exp, mesh(exp.mesh), start.tokenizer(make()))


def test_a_penalty_that_the_loss_does_not_know(example):
    exp = config.override(example("distill"), ["optim.z_loss=0.1"])
    with pytest.raises(AtomError, match=r"optim\.z_loss does not go with distill"), opened(exp):
        pass


def test_chains_of_stages(tmp_path):
    first = make("train.steps=1")
    second = dataclasses.replace(make("train.steps=2"), first=first)
    third = dataclasses.replace(make("train.steps=3"), first=second)
    stages = third.stages(tmp_path)
    assert [place.relative_to(tmp_path).parts for _, place in stages] == [("first", "first"), ("first",), ()]
    assert [exp.train.steps for exp, _ in stages] == [1, 2, 3]
    assert [exp.init_from for exp, _ in stages] == ["", str(tmp_path / "first" / "first"), str(tmp_path / "first")]


def test_a_chain_of_stages_has_one_trained_tokenizer(tmp_path):
    def stage(source, tokenizer="words:256", first=None):
        exp = make(tokenizer=tokenizer, first=first)
        return dataclasses.replace(exp, data=dataclasses.replace(exp.data, sources=(source, "reason:subset")))

    third = stage("reason:subset:letters=6", first=stage("reason:subset:letters=5", first=stage("reason:subset")))
    (one, _), (two, _), (three, _) = third.stages(tmp_path)
    assert one.tokenizer_texts == ("reason:subset", "reason:subset:letters=5", "reason:subset:letters=6")
    assert (one.tokenizer, two.tokenizer, three.tokenizer) == ("words:256", "", "")
    assert two.tokenizer_sources == three.tokenizer_sources == ()
    (one, _), (two, _) = stage("reason:subset", first=stage("austen", "bytes")).stages(tmp_path)
    assert (one.tokenizer, two.tokenizer) == ("bytes", "words:256")


def test_experiments_of_earlier_versions_are_read_and_resumed():
    old = json.loads(pathlib.Path("tests/golden/experiments.json").read_text())
    for name, saved in old.items():
        exp = config.from_json(Experiment, saved, name)
        assert config.from_json(Experiment, config.to_json(exp), name) == exp
        assert check_resumable(exp, config.override(exp, ["train.steps=9"]), name) == [
            f"train.steps: {exp.train.steps} -> 9"
        ]
    exp = config.from_json(Experiment, old["dms"], "dms")
    assert [type(o) for o in exp.objectives] == [Fit, Distill] and exp.fit.entries == 64
    exp = config.from_json(Experiment, old["bolmo"], "bolmo")
    assert exp.objectives[-1].stage == 2 and exp.first.objectives[-1].imitate.depth == 1


def test_a_name_that_is_taken(example):
    @register
    @dataclasses.dataclass(frozen=True)
    class Taken(NextToken):
        name = "taken"

        def extra_spec(self, cfg):
            return {"embed": {}}

    try:
        exp = make(objective=Taken())
        with pytest.raises(AtomError, match="taken: there are parameters embed already"), opened(exp):
            pass
    finally:
        OBJECTIVES.pop("taken")
