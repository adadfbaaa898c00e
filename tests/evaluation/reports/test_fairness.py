"""The table of languages, with models that know what units they cut."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.__main__ import main
from atom_jax.evaluation import run
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.reports import fairness
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.evaluation.tasks.bpb import BpbSettings
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.train import train
from atom_jax.typing import AtomError, Output

TEXTS = {
    "de": ["ein Haus am See", "zwei Boote", "noch ein langer Satz auf Deutsch, für den Test " * 4],
    "en": ["a house by a lake", "two boats", "one more long sentence for the test " * 4],
    "zh": ["湖边的房子", "两条船", "测试用的长句子" * 9],
}


@pytest.fixture
def source(tmp_path):
    for language, texts in TEXTS.items():
        folder = tmp_path / "texts" / language / "test"
        folder.mkdir(parents=True)
        (folder / "pages.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(tmp_path / "texts")


@pytest.fixture
def words(monkeypatch):
    """A model with two stages: a unit ends at every space, an inner one at every second of those within a row."""

    def apply(lm, ids, mask=None):
        first = jnp.asarray(ids) == 32
        second = first & (jnp.cumsum(first, axis=1) % 2 == 0)
        return Output(jnp.zeros((*np.shape(ids), 264)), {"boundaries": (first, second)})

    monkeypatch.setattr(fairness, "apply", apply)


def test_reads_the_same_documents_english_first(source):
    assert fairness.read(source, 0) == {k: [t.encode() for t in TEXTS[k]] for k in ("en", "de", "zh")}
    assert [len(t) for t in fairness.read(source, 26).values()] == [2, 2, 2]
    assert [len(t) for t in fairness.read(source, 25).values()] == [1, 1, 1]
    assert [len(t) for t in fairness.read(source, 1).values()] == [1, 1, 1]


def test_texts_that_are_not_parallel(source, tmp_path):
    (tmp_path / "texts" / "de" / "test" / "pages.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(AtomError, match=r"differ in their number of test documents \(en 3, de 1, zh 3\)"):
        fairness.read(source, 0)
    with pytest.raises(AtomError, match="no directory there has a test split"):
        fairness.read(str(tmp_path), 0)


def test_rates_that_make_equal_units(source):
    """Of what is not Latin, English has nothing; German cannot be changed."""
    folder = pathlib.Path(source)
    for language in TEXTS:
        shutil.copytree(folder / language / "test", folder / language / "train")
    latin, han = fairness.priors(source, ("latin", "han"), 0.2)
    size = {language: sum(len(t.encode()) for t in texts) for language, texts in TEXTS.items()}
    assert latin == 0.2
    np.testing.assert_allclose(han * size["zh"], 0.2 * size["en"], rtol=1e-5)
    with pytest.raises(AtomError, match=r"no rates between 0 and 1 .*\(latin 0.200, cyrillic 0.000\)"):
        fairness.priors(source, ("latin", "cyrillic"), 0.2)
    with pytest.raises(AtomError, match="unknown script 'elvish'"):
        fairness.priors(source, ("latin", "elvish"), 0.2)


def test_bits_per_byte_are_those_of_the_bpb_task(lm, source):
    cfg = EvalConfig(bpb=BpbSettings((f"{source}/de",), "test"), max_length=48, batch_tokens=128)
    expected = run.evaluate(lm, ["bpb"], cfg)["bpb"]
    row = fairness.measure(lm, run.make_encoder(lm, cfg), fairness.read(source, 0)["de"], 128)
    np.testing.assert_allclose(row["bits_per_byte"], expected.metrics["bpb"].value, rtol=1e-5)
    assert row["bytes"] == expected.notes["bytes"] == row["units"][0] and row["bytes_per_unit"] == [1.0]


def test_units_of_a_subword_model_are_tokens(lm):
    tokenizer = train("bpe:300", [b"the boats and the lakes " * 50])
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, vocab_size=304), tokenizer=tokenizer)
    lm = dataclasses.replace(lm, params=lm.params | {"embed": jnp.zeros((304, 16))})
    documents = [b"the boats and the boats", "湖".encode()]
    row = fairness.measure(lm, Encoder(tokenizer, 32, True), documents, 64)
    assert row["units"] == [sum(len(tokenizer.encode(d)) for d in documents)] and row["units"][0] < row["bytes"]
    # Equal probabilities for all of the 304 entries.
    np.testing.assert_allclose(row["bits_per_byte"], row["units"][0] * np.log2(304) / row["bytes"], rtol=1e-5)


@pytest.mark.parametrize("length", [12, 13, 64, 500])
def test_learned_units_count_once_however_a_text_is_cut(lm, words, length):
    documents = [t.encode() for t in TEXTS["en"]]
    units = fairness.count_units(lm, Encoder(ByteTokenizer(), length, True), documents, 128)
    assert units[0] == sum(t.count(" ") for t in TEXTS["en"])
    if length == 500:
        assert units[1] == sum(t.count(" ") // 2 for t in TEXTS["en"])


def test_command(lm, words, source, tmp_path, capsys, monkeypatch):
    atom_jax.save_hf(lm, tmp_path / "a")
    out = tmp_path / "out.json"
    paths = [f"--checkpoint={tmp_path}/a"] * 2
    assert main(["atom_jax", "fairness", *paths, f"--source={source}", f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 documents") and lines[1].startswith("[1] ") and lines[2].startswith("[2] ")
    assert lines[3].split()[:3] == ["language", "bytes", "bits/byte"] and len(lines) == 7
    report = json.loads(out.read_text())
    languages = report["checkpoints"][0]["languages"]
    assert list(languages) == ["en", "de", "zh"] and languages["en"]["premium"] == 1.0
    assert languages["de"]["premium"] == languages["de"]["units"][1] / languages["en"]["units"][1]
    assert languages["zh"]["units"] == [0, 0] and lines[6].split()[0] == "zh"
    assert f"{languages['de']['bits_per_byte']:.3f}" in lines[5]
