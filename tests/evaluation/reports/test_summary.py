"""The summary at the end of the quickstart, of tiny runs."""

import dataclasses
import json

import pytest

from atom_jax import config
from atom_jax.__main__ import main
from atom_jax.data.config import DataConfig
from atom_jax.evaluation.reports import summary, transplanted
from atom_jax.models.hnet import HNetConfig, chunking
from atom_jax.training import loop
from atom_jax.typing import AtomError

STEPS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split, n in (("train", 60), ("validation", 20)):
        (folder / split).mkdir()
        (folder / split / "a.txt").write_text("It was a truth, universally acknowledged.\n\n" * n)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory, text, curves, one_device):
    cfg = HNetConfig(
        vocab_size=264, layout=("T1", "T1", "T1"), d_model=(16, 16), d_intermediate=(16, 16), n_heads=(2, 2),
        rotary_dim=(8, 8), window=(15, -1), chunking=(chunking(4.0, 0.5),), bos_id=256, eos_ids=(257,), pad_id=258,
    )  # fmt: skip
    exp = config.override(
        config.load_file("configs/lm.py:tiny"),
        [f"data.sources={text}", f"train.steps={STEPS}", "train.eval_every=2"],
    )
    folder = tmp_path_factory.mktemp("learned")
    with curves():
        loop.fit(dataclasses.replace(exp, model=cfg), folder)
    return folder


def test_summary_of_learned_units(learned, capsys):
    assert (learned / "plots" / "units.png").is_file(), "no curves of the units"
    assert main(["atom_jax", "summary", str(learned), "--sample_tokens=4"]) == 0
    out = capsys.readouterr().out
    assert f"this model, {STEPS} steps" in out and "A sample\nIt was" in out
    shown = out.partition("A piece of the validation text in the model's units\n")[2].splitlines()
    assert shown[0] == "Units of stage 0, made of bytes" and shown[1].startswith("[")
    assert "bytes per unit" in out and "begin at the edge of a word" in out and "nats where a unit begins" in out
    assert (learned / "plots" / "boundaries.png").is_file() and (learned / "plots" / "summary.png").is_file()
    assert f"-m atom_jax units --checkpoint={learned}" in out
    assert f"--config=configs/units.py --workdir=runs/longer --set train.steps={4 * STEPS}" in out
    assert "-m benchmarks.units" in out
    assert "H-Net's published format" in out and "configs/lm.py" not in out


def test_formats_that_cannot_say_the_model_are_not_offered(learned, tmp_path):
    saved = json.loads((learned / "experiment.json").read_text())
    saved["model"]["head_bias"] = True
    (tmp_path / "experiment.json").write_text(json.dumps(saved))
    commands = summary.next_commands(tmp_path)
    assert "convert" not in commands and "units" in commands


def test_summary_of_a_plain_model(tmp_path):
    exp = config.load_file("configs/lm.py:tiny")
    (tmp_path / "experiment.json").write_text(json.dumps(config.to_json(exp)))
    commands = summary.next_commands(tmp_path)
    assert "--config=configs/lm.py:base" in commands and "transformers loads" in commands and "units" not in commands
    found = summary.Summary({"this model": 2.0}, "It was so", tmp_path / "summary.png")
    assert str(found).splitlines()[1:] == ["  this model  2.000", "", "A sample", "It was so"]


def test_the_piece_of_text_has_whole_lines_words_and_characters(learned, tmp_path):
    data = summary._experiment(learned).data
    assert summary._piece(data).decode().startswith("It was") and 250 < len(summary._piece(data)) <= summary.SHOWN
    for i, (text, size) in enumerate([("é" * 301, 298), ("short", 5), ("a" * 299, 299), ("ab " * 200, 299)]):
        (tmp_path / f"{i}.txt").write_text(text)
        (tmp_path / str(i) / "validation").mkdir(parents=True)
        (tmp_path / f"{i}.txt").rename(tmp_path / str(i) / "validation" / "a.txt")
        (tmp_path / str(i) / "train").mkdir()
        (tmp_path / str(i) / "train" / "a.txt").write_text("x")
        piece = summary._piece(dataclasses.replace(data, sources=(str(tmp_path / str(i)),)))
        assert piece.decode() in text and len(piece) == size


def test_the_sample_is_checked_before_the_work(capsys):
    assert main(["atom_jax", "summary", "nowhere", "--sample_tokens=0"]) == 1
    assert "--sample_tokens: expected a whole number from 1" in capsys.readouterr().err


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(AtomError, match=r"not a training directory: it has no experiment\.json"):
        summary.summarize(str(tmp_path))


@pytest.mark.parametrize("source", ["facts:austen", "reason:subset"])
def test_sources_without_an_end_are_not_read_to_it(source, tmp_path):
    assert summary._baselines(tmp_path, DataConfig(sources=("austen", source))) == {}
    with pytest.raises(AtomError, match=f"{source}: a program makes it without an end"):
        transplanted.documents(source, "train", 0)
    assert sum(map(len, transplanted.documents(source, "train", 5000))) <= 5000


def test_large_texts_are_not_counted(text, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "LARGEST", 100)
    assert summary._baselines(tmp_path, DataConfig(sources=(str(text),))) == {}
