import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as tk

from atom_jax import config, params
from atom_jax.data.fetch import evaldata
from atom_jax.data.fetch.evaldata import Layout
from atom_jax.evaluation import metrics
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.tasks import TASKS, EvalConfig
from atom_jax.evaluation.tasks.bpb import BpbSettings, TextBpb
from atom_jax.evaluation.tasks.choice import Choice, ChoiceSettings, accuracies
from atom_jax.evaluation.tasks.gold import Gold
from atom_jax.evaluation.tasks.requests import Drawn, Request
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import LM, AtomError
from tests.evaluation.conftest import rows
from tests.evaluation.test_loglik import collect, direct

BYTES = Encoder(ByteTokenizer(), 64, True)


def result(lm, task, settings, encoder=BYTES, batch_tokens=200):
    plan = task.plan(settings, encoder)
    return plan.summarize(collect(lm, plan.items, batch_tokens))


def test_standard_errors():
    assert metrics.proportion([True, False, False, False]) == (0.25, math.sqrt(0.25 * 0.75 / 4))
    assert metrics.mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert metrics.perplexity([1.0, 2.0, 3.0]) == pytest.approx((math.e**2, math.e**2 / math.sqrt(3)))
    assert math.isnan(metrics.mean([1.0]).stderr)
    rng = np.random.default_rng(0)
    bottom = rng.uniform(50, 150, 400)
    top = bottom * rng.normal(2, 0.3, 400)
    found = metrics.ratio(top, bottom)
    draws = [metrics.ratio(top[i], bottom[i]).value for i in rng.integers(0, 400, (500, 400))]
    assert found.value == pytest.approx(top.sum() / bottom.sum())
    assert found.stderr == pytest.approx(np.std(draws), rel=0.15)


def test_accuracies_by_hand():
    documents = [
        Request(0, ("q", "q"), (" ab", " abcd"), 1, "Answer:"),
        Request(1, ("q", "q", "q"), (" é", " bb", " b"), 0, "Answer:"),
    ]
    plain = [np.array([-3.0, -4.0]), np.array([-3.0, -2.0, -2.0])]
    alone = [np.array([-3.0, -3.5]), np.array([-5.0, -3.0, -2.0])]
    found = accuracies(documents, plain, alone, {"format": "rc"})
    # acc: " ab" and " bb"; per byte: " abcd" (-4/4) and " bb" (-2/2) over " é" (-3/2); beyond alone: " ab" and " é".
    assert {k: m.value for k, m in found.metrics.items()} == {"acc": 0.0, "acc_byte": 0.5, "acc_pmi": 0.5}
    assert found.metrics["acc_byte"].stderr == math.sqrt(0.25 / 2)
    assert found.count == 2
    assert found.notes == {"chance": pytest.approx((1 / 2 + 1 / 3) / 2), "majority": 0.5, "format": "rc"}


def test_letters_need_no_normaliser():
    documents = [Request(0, ("q", "q"), (" A", " B"), 1)]
    assert list(accuracies(documents, [np.array([-1.0, -0.5])], [], {}).metrics) == ["acc"]


def test_choice_on_a_model(lm, write):
    documents = [((f"Q{i}: {'?' * i}",) * 2, (f" {i}", f" {i * 7}{i}"), i % 2) for i in range(9)]
    write("toy/rc", rows(documents, "Answer:"), Layout(9, doubled=True))
    write("toy/mc", rows(documents), Layout(9))
    task = Choice("toy", ("rc", "mc"))

    def log_likelihood(context, answer):
        return direct(lm, BYTES.pair(context, answer).items[0])[0]

    plain = [[log_likelihood(c, a) for c, a in zip(d[0], d[1])] for d in documents]
    pmi = [[p - log_likelihood("Answer:", a) for p, a in zip(ps, d[1])] for ps, d in zip(plain, documents)]
    found = result(lm, task, ChoiceSettings())
    assert found.count == 9 and found.notes["format"] == "rc" and found.notes["cut"] == 0
    gold = [d[2] for d in documents]
    assert found.metrics["acc"].value == np.mean(np.argmax(plain, axis=1) == gold)
    assert found.metrics["acc_pmi"].value == np.mean(np.argmax(pmi, axis=1) == gold)
    other = result(lm, task, ChoiceSettings(format="mc"))
    assert other.metrics["acc"] == found.metrics["acc"] and "acc_pmi" not in other.metrics
    assert result(lm, task, ChoiceSettings(limit=4, seed=1)).count == 4
    with pytest.raises(AtomError, match=r"toy.format=zz: expected one of rc, mc"):
        task.plan(ChoiceSettings(format="zz"), BYTES)


def test_last_word(write):
    write("toy/last", rows([((c,), (" ñu",), ["ñu"]) for c in ("one", "two", "three", "four")]), Layout(4))
    plan = Gold("toy/last", last_word=True).plan(Drawn(), BYTES)
    assert [len(i.ids) - i.start for i in plan.items] == [4] * 4
    nats = np.array([1.0, 2.0, 4.0, 1.0])
    found = plan.summarize([Score(-n, n == 1.0) for n in nats])
    assert found.count == 4 and found.notes == {"cut": 0}
    assert found.metrics["acc"] == metrics.proportion([True, False, False, True])
    assert found.metrics["ppl"].value == pytest.approx(math.exp(2))
    assert found.metrics["bpb"].value == pytest.approx(8 / math.log(2) / 16)
    assert found.metrics["bpb_mean"] == pytest.approx(metrics.mean(nats / math.log(2) / 4))
    plan = Gold("toy/last").plan(Drawn(limit=2), BYTES)
    assert list(plan.summarize([Score(-1.0, True)] * 2).metrics) == ["bpb", "bpb_mean"]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text" / "test"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.txt").write_text("Straße " * i + "It was a truth, universally acknowledged. " * (i + 1))
    return tmp_path / "text"


def total_bytes(folder):
    return sum(p.stat().st_size for p in folder.rglob("*.txt"))


def test_bpb_equals_a_hand_computation(lm, text):
    settings = BpbSettings(sources=(str(text),), split="test")
    whole = Encoder(ByteTokenizer(), 1000, True)
    found = result(lm, TextBpb(), settings, whole)
    nats = 0.0
    for path in sorted(text.rglob("*.txt")):
        ids = [256, *path.read_bytes()]
        logits = transformer.apply(
            lm.params,
            transformer.Batch(jnp.array([ids]), jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), jnp.int32)),
            cfg=lm.config,
        )[0].logits[0]
        nats -= float(jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]].sum())
    assert found.metrics["bpb"].value == pytest.approx(nats / math.log(2) / total_bytes(text), rel=1e-5)
    assert found.notes["documents"] == found.count == 3 and found.notes["bytes"] == total_bytes(text)


def test_bpb_does_not_depend_on_batches(lm, text):
    settings = BpbSettings(sources=(str(text),), split="test", context=20)
    encoder = Encoder(ByteTokenizer(), 40, True)
    found = [result(lm, TextBpb(), settings, encoder, n).metrics["bpb"] for n in (40, 200, 2000)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert math.isfinite(found[0].stderr)


def test_bpb_is_comparable_across_tokenizers(uniform, text, tmp_path):
    """Under uniform predictions it is log2 of the vocabulary times the tokens that a byte takes."""
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["It was a truth, universally acknowledged. Straße " * 3], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = JsonTokenizer(tmp_path)
    cfg = dataclasses.replace(uniform.config, vocab_size=320)
    zeros = jax.tree.map(jnp.zeros_like, params.init(jax.random.key(0), transformer.spec(cfg)))
    settings = BpbSettings(sources=(str(text),), split="test")
    tokens = sum(len(tokenizer.encode(p.read_bytes())) for p in text.rglob("*.txt"))
    assert tokens < total_bytes(text) / 2

    of_bytes = result(uniform, TextBpb(), settings).metrics["bpb"]
    of_words = result(LM(cfg, zeros, tokenizer), TextBpb(), settings, Encoder(tokenizer, 64, False)).metrics["bpb"]
    assert of_bytes.value == pytest.approx(math.log2(264), rel=1e-5)
    assert of_words.value == pytest.approx(math.log2(320) * tokens / total_bytes(text), rel=1e-5)


def test_bpb_counts_errors_over_documents_when_there_are_many(uniform, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("ab" * (50 + i))
    found = result(uniform, TextBpb(), BpbSettings(sources=(str(tmp_path),), split="all"))
    assert found.notes["documents"] == 40 < found.count
    assert found.metrics["bpb"].stderr == pytest.approx(0, abs=1e-5)
    some = result(uniform, TextBpb(), BpbSettings(sources=(str(tmp_path),), split="all", limit=7))
    assert some.count == 7 and some.metrics["bpb"].value == pytest.approx(math.log2(264), rel=1e-5)


def test_table_and_configuration():
    cfg = config.override(
        EvalConfig(), ["lambada.limit=1000", "bpb.sources=austen,pystdlib", "piqa.format=val_mc_5shot"]
    )
    assert cfg.lambada.limit == 1000 and cfg.bpb.sources == ("austen", "pystdlib")
    assert cfg.piqa.format == "val_mc_5shot" and cfg.arc_easy.format == ""
    assert config.from_json(EvalConfig, config.to_json(cfg)) == cfg
    with pytest.raises(AtomError, match="no field 'lambda'"):
        config.override(EvalConfig(), ["lambda.limit=1"])
    used = set()
    for name, task in TASKS.items():
        assert isinstance(getattr(EvalConfig(), name), type(task.settings))
        used |= {task.file} if isinstance(task, Gold) else set()
        used |= {f"{task.name}/{f}" for f in task.formats} if isinstance(task, Choice) else set()
    assert used == set(evaldata.FILES)


def test_log_likelihoods_are_sums(lm):
    """A continuation that needs several windows has the likelihood of all of them."""
    encoder = Encoder(ByteTokenizer(), 16, True)
    piece = encoder.pair("Say", " something that is longer than the window")
    assert len(piece.items) > 2
    scores = collect(lm, piece.items, 100)
    assert sum(s.logprob for s in scores) == pytest.approx(sum(direct(lm, i)[0] for i in piece.items), abs=1e-3)
