import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import atom_jax
from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.data.fetch.evaldata import Layout
from atom_jax.evaluation import run
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import EvalConfig, kv, kv_cells, needle
from atom_jax.inference.score import logprobs
from atom_jax.kvcache import policies
from atom_jax.kvcache.dms import DMS, Revised
from atom_jax.kvcache.knorm import KNorm
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError
from tests.evaluation.conftest import rows
from tests.inference.toy_policy import Toy

BYTES = Encoder(ByteTokenizer(), 64, False)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", {"toy": Toy})
    monkeypatch.setattr(run.jax, "devices", lambda: jax.local_devices()[:1])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 5)
    return path


@pytest.fixture
def cfg(text):
    settings = ["parts=loss", "context=32", "scored=8", "windows=3", "batch=2", "budgets=16,8", f"sources={text}"]
    return config.override(EvalConfig(), [f"kv.{s}" for s in settings])


def test_loss_in_json_picture_and_table(lm, cfg, text, tmp_path):
    out = tmp_path / "new" / "out.json"
    results = run.evaluate(lm, ["kv"], cfg, out)
    entry = json.loads(out.read_text())["tasks"]["kv"]
    source, rows = str(text), entry["rows"]
    starts = entry["windows"][source]
    assert starts == [0, 80, 161] and len(rows) == 1 + 2 * 2
    # The front token counts as one of the context's.
    ids = [[lm.tokenizer.bos_id, *text.read_bytes()[s : s + 39]] for s in starts]
    each = -np.asarray(logprobs(lm, ids))[:, 31:].mean(1)
    dense = rows[0]
    assert dense["value"] == pytest.approx(each.mean(), abs=1e-5)
    assert dense["stderr"] == pytest.approx(each.std(ddof=1) / 3**0.5, abs=1e-5)
    assert (dense["policy"], dense["budget"], dense["part"], dense["held"]) == ("none", None, "loss", 32)
    # 2 layers, keys and values, 1 head of 8 floats, 32 tokens.
    assert dense["bytes"] == 2 * 2 * 8 * 32 * 4 and dense["windows"] == 3
    for row in rows[1:]:
        assert (row["policy"], row["held"], row["held_max"]) == ("toy", row["budget"], row["budget"])
    by = {(r["budget"], r["part"]): r for r in rows[1:]}
    assert set(by) == {(b, p) for b in (16, 8) for p in ("loss", "added")}
    for b in (16, 8):
        assert by[b, "added"]["value"] == pytest.approx(by[b, "loss"]["value"] - dense["value"], abs=1e-9)
        assert by[b, "added"]["stderr"] < by[b, "loss"]["stderr"] + dense["stderr"]
    with Image.open(out.with_suffix(".png")) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - [0x00, 0x72, 0xB2]).sum(1) < 30).any(), "the line of the first policy"
    lines = run.table(results).splitlines()
    assert lines[0] == "kv" and lines[1].split()[:3] == ["policy", "part", "source"] and len(lines) == 2 + 5


def test_an_interrupted_run_goes_on(lm, cfg, tmp_path, monkeypatch):
    whole = run.evaluate(lm, ["kv"], cfg)["kv"].notes["rows"]
    measure, calls = kv_cells.measure, []

    def breaking(lm, cell, *rest):
        calls.append(cell.method[:2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(lm, cell, *rest)

    monkeypatch.setattr(kv_cells, "measure", breaking)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(lm, ["kv"], cfg, out)
    kept = out.with_name("out.json.cells.jsonl")
    assert len(kept.read_text().splitlines()) == 2 and not out.exists()
    with open(kept, "a") as f:
        f.write('{"key": "torn')
    assert run.evaluate(lm, ["kv"], cfg, out)["kv"].notes["rows"] == whole
    assert calls == [("none", None), ("toy", 16), ("toy", 8), ("toy", 8)]
    run.evaluate(lm, ["kv"], config.override(cfg, ["kv.budgets=8,4"]), out)
    assert calls[4:] == [("toy", 4)]
    run.evaluate(lm, ["kv"], config.override(cfg, ["kv.scored=9", "kv.budgets=8"]), out)
    assert calls[5:] == [("none", None), ("toy", 8)]


def test_last_words(lm, cfg, write):
    words = ["one", "two", "three", "four", "five"]
    documents = [((f"{w} and {w * 3}",), (" " + w,), [w]) for w in words]
    write("lambada/bpb_0shot", rows(documents), Layout(5))
    cfg = config.override(cfg, ["kv.parts=lambada", "kv.budgets=64", "kv.limit=4", "batch_tokens=64"])
    results = run.evaluate(lm, ["kv", "lambada"], config.override(cfg, ["lambada.limit=4"]))
    dense, nats, toy, toy_nats = results["kv"].notes["rows"]
    assert [r["part"] for r in (dense, nats)] == ["lambada", "lambada_nats"] and dense["windows"] == 4
    assert dense["value"] == results["lambada"].metrics["acc"].value
    assert np.exp(nats["value"]) == pytest.approx(results["lambada"].metrics["ppl"].value, rel=1e-4)
    # A budget that holds everything changes nothing.
    assert toy["value"] == dense["value"] and toy_nats["value"] == pytest.approx(nats["value"], abs=1e-5)
    assert toy["held"] == dense["held"]


def test_lambada_needs_its_file(lm, cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_EVALDATA", str(tmp_path))
    with pytest.raises(AtomError, match="make evaldata"):
        run.evaluate(lm, ["kv"], config.override(cfg, ["kv.parts=lambada"]))


def test_needles_run(lm, cfg, monkeypatch):
    monkeypatch.setattr(needle, "_QUESTION", " {city} is")
    monkeypatch.setattr(needle, "_SENTENCE", " {city} is {number}.")
    monkeypatch.setattr(needle, "_CITIES", ("Oslo",))
    settings = ["kv.parts=needle", "kv.lengths=44,48", "kv.depths=0,1", "kv.needles=1", "kv.budgets=8"]
    found = run.evaluate(lm, ["kv"], config.override(cfg, settings))["kv"].notes["rows"]
    assert [r["source"] for r in found[:4]] == ["44 tokens"] * 2 + ["48 tokens"] * 2
    assert len(found) == 8 and found[0]["held"] == 44 and len(found[0]["depths"]) == 2 and found[0]["windows"] == 2
    assert found[1]["part"] == "needle_nats" and found[1]["value"] > 0


def test_facts_are_read_once_and_asked_for_afterwards(lm, cfg):
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=1024))
    settings = ["parts=facts", "fact_lengths=400", "fact_texts=2", "facts=3", "kinds=number,pet", "budgets=390"]
    cfg = config.override(cfg, [f"kv.{s}" for s in settings])
    found = run.evaluate(lm, ["kv"], cfg)["kv"].notes["rows"]
    names = ["facts", "facts_nats", "facts:number", "facts:pet"]
    assert [r["part"] for r in found] == names * 2 and [r["windows"] for r in found[:4]] == [6, 6, 4, 2]
    assert found[0]["held"] == 400 and found[4]["held"] == 390
    asks = kv._facts(cfg.kv, Encoder(lm.tokenizer, 1024, True), needle.Haystack.of(kv._read("austen"), BYTES), 400)
    assert asks[0].context is asks[2].context and len(asks[3].context) == 400 and asks[0].kind in ("number", "pet")
    nats = []
    for ask in asks:
        ids = np.concatenate([ask.context, ask.question, ask.target])
        text = lm.tokenizer.decode(ask.context)
        assert lm.tokenizer.decode(ask.target).strip() in text
        nats.append(-float(np.asarray(logprobs(lm, ids[None]))[0, -len(ask.target) :].sum()))
    assert found[1]["value"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found[1]["value"] != found[5]["value"]


def test_a_needle_is_where_it_should_be():
    hay = needle.Haystack.of(kv._read("austen"), BYTES)
    seen, between_sentences = set(), 0
    for depth in (0.1, 0.5, 0.9):
        for i in range(3):
            one = needle.build(hay, BYTES, 1024, depth, (0, i))
            assert len(one.ids) == 1024
            again = needle.build(hay, BYTES, 1024, depth, (0, i))
            assert (again.ids == one.ids).all() and again.number == one.number
            text = BYTES.tokenizer.decode(one.ids)
            sentence = f" The secret number of {one.city} is {one.number}."
            assert text.count(one.number) == 1 and text.index(sentence) == one.at
            between_sentences += text[one.at - 1] in '.!?"\n'
            question = f" What is the secret number of {one.city}? The secret number of {one.city} is"
            assert text.endswith(question)
            assert abs(one.at / (1024 - len(sentence) - len(question)) - depth) < 0.101
            assert BYTES.tokenizer.decode(one.answer) == f" {one.number}" and len(one.number) == 7
            seen.add((one.number, text[:20]))
    # Nowhere else but in sentences of more than 160 letters.
    assert between_sentences >= 6
    assert len(seen) == 3, "the seed chooses the number and the text, the depth does not"
    in_front = needle.build(hay, Encoder(ByteTokenizer(), 64, True), 512, 0.3, (0, 1))
    assert len(in_front.ids) == 512 and in_front.ids[0] == ByteTokenizer().bos_id
    with pytest.raises(AtomError, match="have no room for a needle"):
        needle.build(hay, BYTES, 100, 0.5, (0,))


def test_policies_and_budgets(lm, monkeypatch):
    def chosen(*names, budgets=(16, 8)):
        settings = kv.KvSettings(policies=names, budgets=budgets)
        return [(m.name, m.budget, m.memory) for m in kv.methods(settings, lm.config)]

    none = ("none", None, None)
    assert chosen("none") == [none]
    assert chosen() == chosen("toy", "none") == [none, ("toy", 16, Toy(16)), ("toy", 8, Toy(8))]
    assert chosen("toy:budget=5") == [none, ("toy:budget=5", 5, Toy(5))]
    # What --set makes of kv.policies=toy:spare=1,budget=4,toy.
    assert chosen("toy:spare=1", "budget=4", "toy", budgets=(8,)) == [
        none, ("toy:spare=1,budget=4", 4, Toy(4, 1)), ("toy", 8, Toy(8)),
    ]  # fmt: skip
    # Policies that have no budget of their own accord.
    for policy in (SnapKV, KNorm):
        monkeypatch.setitem(policies.POLICIES, policy.name, policy)
    assert chosen("snapkv:window=8", "knorm", budgets=(9,)) == [
        none, ("snapkv:window=8", 9, SnapKV(budget=9, window=8)), ("knorm", 9, KNorm(budget=9)),
    ]  # fmt: skip


def test_the_models_own_evictors_are_revised(lm, monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", {p.name: p for p in (DMS, Revised)})
    settings = kv.KvSettings(policies=("revised:form=model", "share=0.2"))
    own = DMS("adapter", window=4)
    found = kv.methods(settings, dataclasses.replace(lm.config, memory=own))
    assert found[1:] == [kv.Method("revised:form=model,share=0.2", None, Revised.of(own, share=0.2))]
    with pytest.raises(AtomError, match="with learned evictors"):
        kv.methods(settings, lm.config)


def test_adapters_stand_beside_policies(lm, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", {p.name: p for p in (DMS, Toy)})
    own = dataclasses.replace(lm.config, memory=DMS("adapter", window=4, scale=1.0, offset=0.0))
    new = params_lib.flatten(params_lib.init(jax.random.key(0), transformer.spec(own)))
    new["layers/attn/dms/alpha"] = jax.random.normal(jax.random.key(1), new["layers/attn/dms/alpha"].shape)
    own = dataclasses.replace(lm, config=own, params=params_lib.unflatten(new | params_lib.flatten(lm.params)))
    atom_jax.save_adapter(own, tmp_path / "mine")
    alone = run.evaluate(own, ["kv"], config.override(cfg, ["kv.policies=model"]))
    both = run.evaluate(lm, ["kv"], config.override(cfg, [f"kv.adapters={tmp_path / 'mine'}", "kv.policies=toy"]))
    rows = lambda found: found["kv"].notes["rows"]  # noqa: E731
    names = [row["policy"] for row in rows(both)]
    mine = str(tmp_path / "mine")
    assert set(names) == {"none", "toy", mine} and names[-1] == mine
    expected, found = ([r for r in rows(x) if r["policy"] == n] for x, n in ((alone, "model"), (both, mine)))
    assert 5 < found[0]["held"] < 30
    assert [dict(r, policy="") for r in found] == [dict(r, policy="") for r in expected]
    other = dataclasses.replace(own, params=jax.tree.map(lambda x: x + 1, own.params))
    atom_jax.save_hf(other, tmp_path / "other")
    with pytest.raises(AtomError, match="made for another model"):
        run.evaluate(lm, ["kv"], config.override(cfg, [f"kv.adapters={tmp_path / 'other'}"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["parts=loss,speed"], "no part 'speed'"),
        (["parts="], "no part ''"),
        (["policies=model"], "no memory of its own"),
        (["policies=zip"], "memory 'zip'"),
        (["policies=toy:size=3"], "no field 'size'"),
        (["budgets=0"], "budgets: expected a whole number from 1"),
        (["budgets="], "kv.budgets: there is none"),
        (["windows=0"], "kv.windows=0: windows: expected a whole number from 1"),
        (["context=60"], "reads up to 68 tokens, the model was made for 64"),
        (["parts=needle"], "the model was made for 64"),
        (["depths=1.5"], "depths: expected a number from 0 to 1"),
        (["adapters=/no/such/adapter"], "^kv.adapters: /no/such/adapter"),
        (["parts=facts", "fact_lengths=65", "kinds=zip"], "reads up to 65 tokens, the model was made for 64"),
        (["sources=/no/such/text"], "/no/such/text"),
        (["limit=-1"], "limit: expected a whole number from 0"),
    ],
)
def test_bad_settings(lm, cfg, settings, message):
    with pytest.raises(AtomError, match=message):
        run.evaluate(lm, ["kv"], config.override(cfg, [f"kv.{s}" for s in settings]))


def test_questions_fit_behind_their_contexts(lm, cfg, monkeypatch):
    settings = ["parts=facts", "fact_lengths=256", "policies=none", "kinds=number", "facts=2"]
    cfg = config.override(cfg, [f"kv.{s}" for s in settings])
    read = []
    monkeypatch.setattr(kv, "_measure", lambda lm, cells, *_: read.extend(cells) or [])
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=512))
    run.evaluate(lm, ["kv"], cfg)
    most = max(len(a.context) + len(a.question) + len(a.target) for cell in read for a in cell.asks)
    assert most > 256 + 10
    run.evaluate(dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=most)), ["kv"], cfg)
    with pytest.raises(AtomError, match=f"facts reads up to {most} tokens, the model was made for {most - 1}"):
        run.evaluate(dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=most - 1)), ["kv"], cfg)


def test_a_source_that_is_too_short(lm, cfg, tmp_path):
    (tmp_path / "short.txt").write_text("It is.")
    with pytest.raises(AtomError, match=r"short.txt has 6 tokens, a window has 39"):
        run.evaluate(lm, ["kv"], config.override(cfg, [f"kv.sources={tmp_path}/short.txt"]))


@pytest.mark.parametrize(("settings", "message"), [(["kinds=zip"], "^kv.kinds: no kind 'zip'"),
                                                   (["facts=9000"], "^kv.facts: there are no more")])  # fmt: skip
def test_bad_facts_name_their_setting(lm, cfg, settings, message):
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=512))
    settings = ["parts=facts", "fact_lengths=256", "policies=none", *settings]
    with pytest.raises(AtomError, match=message):
        run.evaluate(lm, ["kv"], config.override(cfg, [f"kv.{s}" for s in settings]))
