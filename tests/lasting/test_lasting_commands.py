"""The commands about memories, and the evaluation and the fit, on tiny models."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.checkpoint.adapters import load_adapter
from atom_jax.data.builtin import novels
from atom_jax.evaluation import run as evaluation
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import EvalConfig, lasting_fit, planted
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.kvcache.shared import Shared
from atom_jax.lasting import learned
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.reread import passages
from atom_jax.models import registry, transformer
from atom_jax.nn.neighbours import Neighbours
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

TEXT = "The captain kept a brass compass in his coat. Nobody knew who had made it. It rained all night. " * 4


@pytest.fixture(scope="module")
def lm():
    cfg = transformer.TransformerConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_length=2048, eos_ids=(257,)
    )
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    tree["embed"] = tree["embed"] * 20
    return LM(cfg, tree, ByteTokenizer())


@pytest.fixture(scope="module")
def home(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    atom_jax.save_hf(lm, path / "model")
    (path / "a.txt").write_text(TEXT)
    (path / "b.txt").write_text("A short one.")
    return path


@pytest.fixture
def run(capsys):
    def call(*args):
        code = main(["atom_jax", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_remember_generate_recall_and_forget(run, home, tmp_path):
    model, where = f"--checkpoint={home}/model", f"--memory_dir={tmp_path}/m"
    options = ["--law=sqrt:entries=8,block=16", "--part=32"]
    code, out, _ = run("remember", model, where, *options, home / "a.txt", home / "b.txt")
    assert code == 0 and out.startswith(f"a.txt: {len(TEXT) + 1} tokens") and "b.txt: 13 tokens" in out
    code, out, _ = run("remember", model, where, home / "b.txt")
    assert code == 0 and out == "b.txt: has been read before\n"
    code, out, _ = run("info", f"{tmp_path}/m", "--verify")
    held = Memory.open(tmp_path / "m").stats()
    assert code == 0 and "sqrt:entries=8,block=16, score observed" in out and "  b.txt: 13 tokens" in out
    assert f"{held['held']:,} without the window, by law {held['law']:,}" in out and "are what was written" in out
    prompt = "--prompt=Who had the compass?"
    code, out, _ = run("generate", model, where, prompt, "--max_new_tokens=6", "--json")
    with Memory.open(tmp_path / "m", atom_jax.load(home / "model")) as memory:
        made = atom_jax.generate(atom_jax.load(home / "model"), [prompt[9:]], 6, memory=memory)
        assert code == 0 and json.loads(out)["ids"] == made.ids
        found = memory.passages(ByteTokenizer().encode("brass compass"), 1)
        assert "brass compass" in ByteTokenizer().decode(found.tolist())
    write = ("generate", model, where, prompt, "--max_new_tokens=3", "--reread=1", "--choice=gated=false")
    code, out, err = run(*write, "--twice")
    assert code == 0 and f"({2 * (64 + len(prompt) - 9)} of prompt" in err
    code, out, err = run(*write, "--remember")
    assert code == 0 and f"({64 + len(prompt) - 9} of prompt" in err
    assert len(Memory.open(tmp_path / "m").sources) == 3
    code, _, err = run("generate", model, where, prompt, "--memory=tova:budget=8")
    assert code == 1 and "--memory_dir: is read whole" in err
    code, out, _ = run("recall", model, where, prompt, "--pages=2")
    assert code == 0 and out.count("tokens ") == 2 and "%  " in out
    code, out, _ = run("forget", where, "--source=a.txt")
    assert code == 0 and out.startswith(f"forgot a.txt, {len(TEXT) + 1} tokens")


def test_a_memory_of_states(run, home, tmp_path):
    model, where = f"--checkpoint={home}/model", f"--memory_dir={tmp_path}/m"
    code, out, _ = run("remember", model, where, "--parts=knn", "--part=32", home / "a.txt", home / "b.txt")
    states = len(TEXT) + 12
    assert code == 0 and f"0 entries per head (0 before), {states} states" in out
    code, out, _ = run("info", f"{tmp_path}/m", "--verify")
    assert code == 0 and f"{states} of knn" in out
    prompt = "--prompt=The captain kept a brass"
    more = [prompt, "--max_new_tokens=6", "--json", "--neighbours=nearest=8,weight=0.9"]
    code, out, _ = run("generate", model, where, *more)
    lm = atom_jax.load(home / "model")
    with Memory.open(tmp_path / "m", lm, neighbours=Neighbours(nearest=8, weight=0.9)) as memory:
        made = atom_jax.generate(lm, [prompt[9:]], 6, memory=memory)
    refused, _, err = run("generate", model, where, prompt, "--choice=pages=2")
    assert refused == 1 and "--choice: is for a memory of entries" in err
    # The text goes on as it was read.
    assert code == 0 and json.loads(out)["text"] == made.text == [" compa"]
    code, out, _ = run("recall", model, where, prompt, "--pages=2")
    assert code == 0 and out.splitlines()[1].split(",")[0].endswith("a.txt")


@pytest.mark.parametrize("args, message", [
    (["remember", "--memory_dir=m", "a"], "--checkpoint is missing"),
    (["remember", "--checkpoint=model", "--memory_dir=m"], "usage: remember"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--source=x", "a", "b"], "--source names one text"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--law=cube", "a.txt"], "law 'cube'"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--score=nowhere", "a.txt"], "score 'nowhere': is no file"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--parts=cards", "a.txt"], "parts: expected levels or knn"),
    (["remember", "--checkpoint=model", "--memory_dir=model", "a.txt"], "and no memory"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--part=1", "a.txt"], "--part: expected 4 tokens or more"),
    (["remember", "--checkpoint=model", "--memory_dir=m", "--codec=zip", "a.txt"], "--codec: expected float16, int8"),
    (["info", "nowhere", "--out=x.png"], "nowhere: no such file or directory"),
    (["generate", "--checkpoint=model", "--memory_dir=nowhere", "--prompt=x"], "--memory_dir=nowhere: there is no"),
    (["generate", "--checkpoint=model", "--remember", "--prompt=x"], "--remember has no meaning without --memory"),
    (["generate", "--checkpoint=model", "--memory_dir=model", "--prompt=x"], "there is no memory"),
    (["generate", "--checkpoint=model", "--memory_dir=m", "--choice=c=3", "--prompt=x"], "--choice: no field 'c'"),
    (["generate", "--checkpoint=model", "--memory_dir=m", "--neighbours=weight=2", "--prompt=x"], "a number from"),
    (["generate", "--checkpoint=model", "--neighbours=weight=0.2", "--prompt=x"], "--neighbours has no meaning"),
    (["recall", "--checkpoint=model", "--memory_dir=nowhere", "--prompt=x"], "--memory_dir=nowhere: there is no"),
    (["forget", "--memory_dir=nowhere", "--source=x"], "--memory_dir=nowhere: there is no"),
    (["forget", "--memory_dir=m"], "--source is missing"),
    (["fit_memory", "--checkpoint=model", "--out=s", "nowhere"], "is no novel (emma, "),
    (["fit_memory", "--checkpoint=model", "--out=s", "--kinds=lies", "a.txt"], "no kind 'lies' of facts"),
    (["fit_memory", "--checkpoint=model", "--out=s", "a.txt"], "96 facts in 8192 tokens"),
    (["fit_memory", "--checkpoint=model", "--out=s", "--ridge=0", "a.txt"], "ridge: expected a number"),
])  # fmt: skip
def test_bad_input_is_one_sentence(run, home, monkeypatch, args, message):
    monkeypatch.chdir(home)
    code, out, err = run(*args)
    assert code == 1 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err


def test_facts_are_planted_whole(lm):
    encoder = Encoder(lm.tokenizer, 1 << 20, False)
    facts = planted.facts((), 33, np.random.default_rng(0))
    assert {f.kind for f in facts} == set(planted.KINDS) and len(set(facts)) == 33
    stream = planted.plant(Haystack.of(novels()["emma"], encoder), facts, 9000, encoder)
    text = lm.tokenizer.decode(stream.ids.tolist())
    assert len(stream.ids) == 9000 == len(stream.wanted)
    said = "".join(chr(i) for i in stream.ids[stream.wanted])
    assert said == "".join(f.answer for f in facts)
    for fact, at in zip(facts, stream.at):
        assert text[at:].startswith(fact.sentence) and text.count(fact.sentence) == 1
        assert not fact.earlier or text.index(fact.earlier) < at
        question, answer = planted.asked(fact, encoder)
        assert lm.tokenizer.decode([*question, *answer]) == f"{fact.question} {fact.answer}"
    with pytest.raises(AtomError, match="there are no more than 24 of kind number"):
        planted.facts(("number",), 25, np.random.default_rng(0))


def test_passages_are_those_with_rare_words():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 9, 300), rng.integers(0, 9, 200)]
    texts[1][100:103] = [50, 51, 52]
    found = passages(texts, np.array([1, 50, 51]), 2)
    assert all(text == 1 and first <= 100 and end >= 103 for text, first, end in found)
    assert passages(texts, np.array([99]), 3) == [] == passages([], np.array([1]), 3)
    # The formula, by hand: one passage of three terms, in a text that has it alone.
    assert passages([np.array([1, 1, 2])], np.array([1]), 1) == [(0, 0, 3)]


def test_a_fit_and_the_evaluation_of_laws(lm, home, tmp_path, monkeypatch, capsys):
    said = []
    text = tmp_path / "text.txt"
    text.write_bytes(novels()["emma"][2000:6000])
    order = lasting_fit.Order((str(text),), str(tmp_path / "s.safetensors"), 700, 4, ("telephone", "ship"), 3.0, 64)
    line = lasting_fit.run(lm, order, said.append)
    assert "fitted on 1 texts" in line and said == [f"{text}: 4 facts in 700 tokens"]
    fitted = learned.load(order.out)
    assert len(fitted.weight) == 2 * 2 * 1 + 2
    first = (tmp_path / "s.safetensors").read_bytes()
    monkeypatch.setattr(lasting_fit, "_moments", lambda *_: pytest.fail("read again"))
    lasting_fit.run(lm, dataclasses.replace(order, policy_out=str(tmp_path / "policy")), said.append)
    assert (tmp_path / "s.safetensors").read_bytes() == first
    with_policy = load_adapter(lm, tmp_path / "policy")
    weights = with_policy.params["layers"]["attn"]["shared"]
    assert with_policy.config.memory == Shared(budget=512, learned=True) and weights["most"].shape == (2, 1)
    assert float(np.abs(weights["total"]).min()) > 0
    with_policy = registry.with_memory(with_policy, Shared(budget=80, window=8, learned=True))
    assert atom_jax.generate(with_policy, TEXT, 3).stats["kv_reads"] == 2 * 80

    monkeypatch.setattr(evaluation.jax, "devices", lambda: jax.local_devices()[:1])
    settings = [f"streams={text}", "tokens=700", "facts=4", "kinds=number,trade", "part=64", "batch=2", "windows=3",
                "scored=20", "laws=none,sqrt:entries=8,block=16,all:block=16+reread,reread,knn"]  # fmt: skip
    settings += [f"scores=observed,{order.out}", "choice.whole=400", "choice.pages=3"]
    cfg = config.override(EvalConfig(), [f"lasting.{s}" for s in settings])
    results = evaluation.evaluate(lm, ["lasting"], cfg, tmp_path / "out.json")
    rows = results["lasting"].notes["rows"]
    assert len(rows) == 6 * len({r["kind"] for r in rows})
    by = {(r["law"], r["score"], r["kind"]): r for r in rows}
    # 700 tokens, of which 60 are in the window and four are sinks.
    assert by["none", "", ""]["entries"] == 0 and by["none", "", ""]["front"] == 64
    assert by["all:block=16+reread", "observed", ""]["entries"] == 636
    assert by["knn", "", ""]["front"] == 64 and by["knn", "", ""]["nats"] != by["none", "", ""]["nats"]
    for score in ("observed", "s.safetensors"):
        assert by["sqrt:entries=8,block=16", score, ""]["entries"] < 200
    assert by["reread", "", "trade"]["facts"] == 2 and "reread" in evaluation.table(results)
    later = {r["law"]: r for r in results["lasting"].notes["later"]}
    assert later["none"]["added"] == 0 and later["none"]["windows"] == 3
    assert len({round(r["nats"], 5) for r in later.values()}) == len(later) == 5
    assert (tmp_path / "out.png").stat().st_size > 10_000
    calls = []
    monkeypatch.setattr("atom_jax.evaluation.tasks.lasting.read", calls.append)
    again = evaluation.evaluate(lm, ["lasting"], cfg, tmp_path / "out.json")
    assert again["lasting"].notes["rows"] == rows and not calls
