"""A subword model becomes a Bolmo: both stages in one run, and what is left behind."""

import contextlib
import json

import chex
import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.data import vocabulary
from atom_jax.data.pipeline import make_iterator
from atom_jax.models import transformer
from atom_jax.training import loop, start
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError
from configs import bolmo

VALIDATION = {
    "loss", "bits_per_byte", "bytes_alone", "source_bits_per_byte", "boundary_accuracy", "boundary_precision",
    "boundary_recall", "bytes_per_unit_0", "lost_0",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    cfg = bolmo.tiny_byteify().model.main
    tokenizer = vocabulary.trained_tokenizer(f"bpe:{cfg.vocab_size}", ("austen",))
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), tokenizer)
    path = tmp_path_factory.mktemp("source")
    atom_jax.save_hf(lm, path)
    return path, lm


def experiment(source, *settings):
    named = [f"{stage}byteify.source={source[0]}" for stage in ("", "first.")]
    return start.configure("configs/bolmo.py:tiny_byteify", [*named, *settings])


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory, curves, one_device):
    workdir = tmp_path_factory.mktemp("whole")
    with curves():
        return workdir, loop.fit(experiment(source), workdir)


def lines(workdir, kind):
    return [x for x in read(workdir / "metrics.jsonl") if x["kind"] == kind]


def test_both_stages_learn(whole):
    workdir, result = whole
    assert result.step == 6 and result.signal == 0
    first, second = lines(workdir / "first", "train"), lines(workdir, "train")
    assert [x["step"] for x in first] == [x["step"] for x in second] == list(range(1, 7))
    for name in ("loss", "encoder", "boundary"):
        assert first[-1][name] < first[0][name]
    assert second[-1]["loss"] < first[-1]["loss"] and second[-1]["boundary"] < first[-1]["boundary"]
    assert all(0 < x["boundary_accuracy"] <= 1 for x in first)
    judged = lines(workdir / "first", "validation") + lines(workdir, "validation")
    assert [x["step"] for x in judged] == [3, 6, 3, 6]
    assert all(set(x) == VALIDATION | {"step", "kind"} for x in judged)
    assert len({x["source_bits_per_byte"] for x in judged}) == 1
    assert all(x["bytes_alone"] < x["bits_per_byte"] for x in judged)
    assert result.validation == {k: judged[-1][k] for k in result.validation}
    for directory in (workdir / "first", workdir):
        assert (directory / "plots" / "byteify.png").exists()


def test_the_source_is_frozen_in_the_first_stage_alone(source, whole):
    workdir, _ = whole
    first, second = (atom_jax.load(path).params for path in (workdir / "first", workdir))
    chex.assert_trees_all_equal(first["main"], source[1].params["layers"])
    assert all((a != b).any() for a, b in zip(*(jax.tree.leaves(p["main"]) for p in (first, second))))
    assert set(first) == set(second) and "source" not in first
    assert (first["subwords"] != source[1].params["embed"]).any()


def test_the_sources_own_bits(source, whole):
    """The reference is what the model itself gives the text."""
    exp, lm = experiment(source).first, source[1]
    tokenizer = start.tokenizer(exp)
    data = make_iterator(config.override(exp.data, ["split=validation"]), tokenizer)
    with contextlib.closing(data):
        batch = next(data)
    nats = size = 0
    for row, sizes in zip(batch["tokens"], batch["lengths"]):
        spoken = row[: (sizes[1:] > 0).sum()]
        logits = atom_jax.apply(lm, np.array([[tokenizer.document_id, *spoken[:-1]]])).logits[0]
        nats -= np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), spoken[:, None], 1).sum()
        size += len(lm.tokenizer.decode_bytes(spoken[spoken != tokenizer.document_id]))
    expected = lines(whole[0], "validation")[0]["source_bits_per_byte"]
    np.testing.assert_allclose(nats / size / np.log(2), expected, rtol=1e-5)


def test_the_result_in_the_published_layout(source, whole, tmp_path):
    lm = atom_jax.load(whole[0])
    assert lm.family == "bolmo" and lm.tokenizer.subwords.vocab_size == 400
    atom_jax.save_hf(lm, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bolmo" and written["subword_vocab_size"] == 400
    again = atom_jax.load(tmp_path)
    chex.assert_trees_all_equal(again.params, lm.params)
    texts = [atom_jax.generate(m, ["It was", "a"], 5).ids for m in (lm, again)]
    assert texts[0] == texts[1] and [len(row) for row in texts[0]] == [5, 5]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["first.data.tokens=0"], "byteify and data.tokens need each other"),
        (["first.byteify.imitate.depth=3"], "imitate.depth: the source has 2 layers"),
        (["first.tokenizer=bytes"], "tokenizer must be bolmo, not 'bytes'"),
        (["first.byteify.source="], "byteify.source is not set"),
        (["first.byteify.source=tests/golden/hf_tiny/llama"], "has no tokenizer.json"),
        (["first.model.main.vocab_size=402"], r"embed is \[400, 32\] there, \[402, 32\] in model.main"),
    ],
)
def test_what_does_not_fit_is_one_sentence(source, tmp_path, settings, words):
    with pytest.raises(AtomError, match=words):
        loop.fit(experiment(source, *settings), tmp_path)
