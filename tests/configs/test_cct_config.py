"""The classifier of images: its variants are complete; the smallest one trains, and is compared with fewer tokens."""

import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.evaluation import run
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.evaluation.tasks.reduction import Reducing
from atom_jax.models import cct
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training import loop, optim, start
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError
from configs import image


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("cct")
    result = loop.fit(start.configure("configs/image.py:cct_tiny", []), workdir)
    return workdir, result


@pytest.mark.parametrize("name", [name for name in image.VARIANTS if name.startswith("cct")])
def test_variant_is_complete(name):
    exp = config.load_file(f"configs/image.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    optim.make(exp.optim, cct.spec(exp.model), exp.train.steps)
    exp.objective.check(exp)


def test_a_classifier_trains_and_is_loaded(trained):
    workdir, result = trained
    lines = [x for x in read(workdir / "metrics.jsonl") if x["kind"] == "train"]
    assert result.step == 24 and all(0 <= x["accuracy"] <= 1 for x in lines)
    assert sum(x["loss"] for x in lines[-8:]) < sum(x["loss"] for x in lines[:8])
    lm = atom_jax.load(workdir)
    assert lm.family == "cct" and params.count(lm.params) == params.count(cct.spec(lm.config))


def test_reducers_are_compared_in_one_run(trained, tmp_path):
    lm, out = atom_jax.load(trained[0]), tmp_path / "found.json"
    cfg = config.override(
        run.resolve(EvalConfig(), str(trained[0])),
        [
            "reduction.ratios=0.5,0.25", "reduction.repeats=1",
            "reduction.reducers=random,tome,globalcom2:rows=4,columns=4", "reduction.inflections=0",
            "reduction.limit=40", "reduction.batch=16",
        ],
    )  # fmt: skip
    result = run.evaluate(lm, ["reduction"], cfg, out)["reduction"]
    rows = {(row["reducer"], row["ratio"]): row for row in result.notes["rows"]}
    assert [*rows] == [
        ("none", 1.0), ("random", 0.5), ("tome", 0.5), ("globalcom2:rows=4,columns=4", 0.5),
        ("tome, all layers (0)", 0.5), ("random", 0.25), ("globalcom2:rows=4,columns=4", 0.25),
    ]  # fmt: skip
    assert rows["random", 0.5]["tokens"] == [64, 32] and rows["tome, all layers (0)", 0.5]["tokens"] == [48, 32]
    full = rows["none", 1.0]
    assert rows["random", 0.25]["flops"] < rows["random", 0.5]["flops"] < full["flops"]
    for row in rows.values():
        assert row["seconds"] > 0 and row["flops"] > 0
        assert row["lost"] == pytest.approx(full["accuracy"] - row["accuracy"])
    assert result.count == 40 and "points lost" in result.table.splitlines()[0]
    assert out.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(AtomError, match=r"reduction.layer: 2, but the model has 2 layers, from 0"):
        run.evaluate(lm, ["reduction"], config.override(cfg, ["reduction.layer=2"]))


def test_what_does_not_fit_is_said():
    for settings, message in (
        (["tokenizer=bytes"], "classify: tokenizer must be pixels, not 'bytes'"),
        (["data.seq_len=66"], "set data.whole, and data.seq_len to the 65 bytes of an image"),
        (["data.sources=labelled:numerals"], "labelled:numerals is 16 x 16 in gray, the model's are 8 with 1"),
        (["data.sources=austen"], "data.sources must be labelled images"),
    ):
        exp = start.configure("configs/image.py:cct_tiny", settings)
        with pytest.raises(AtomError, match=message):
            exp.objective.check(exp)
    with pytest.raises(
        AtomError, match=r"reduction: needs a classifier of images \(cct\), the model is of the kind llama"
    ):
        Reducing().run(LM(TransformerConfig(), {}, None), Reducing.settings, None, None)
