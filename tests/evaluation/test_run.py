import dataclasses
import json

import jax
import numpy as np
import pytest

from atom_jax import config
from atom_jax.data.config import DataConfig
from atom_jax.data.fetch.evaldata import Layout
from atom_jax.evaluation import cache, loglik, run
from atom_jax.evaluation.encode import Item
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.models.fingerprint import fingerprint
from atom_jax.typing import AtomError
from tests.evaluation.conftest import rows


@pytest.fixture
def sets(write):
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    write("lambada/bpb_0shot", rows([((f"{w} and {w * 3}",), (" " + w,), [w]) for w in words]), Layout(7))
    documents = [((f"{w}:",) * 2, (f" {w}", f" {w}{w}"), i % 2) for i, w in enumerate(words)]
    write("piqa/rc_0shot", rows(documents, "Answer:"), Layout(7, doubled=True))


@pytest.fixture
def cfg():
    return config.override(EvalConfig(), ["batch_tokens=64", "max_length=48"])


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(run.jax, "devices", lambda: jax.local_devices()[:1])


def test_results_and_file(lm, sets, cfg, tmp_path):
    out = tmp_path / "new" / "out.json"
    results = run.evaluate(lm, ["lambada", "piqa"], cfg, out)
    report = json.loads(out.read_text())
    assert list(report["tasks"]) == ["lambada", "piqa"]
    for name, result in results.items():
        entry = report["tasks"][name]
        assert entry["count"] == result.count == 7
        assert {k: (m["value"], m["stderr"]) for k, m in entry["metrics"].items()} == result.metrics
    assert report["config"]["piqa"] == {"limit": 0, "seed": 0, "format": ""} and "arc_easy" not in report["config"]
    assert report["config"]["batch_tokens"] == 64 and len(report["fingerprint"]) == 16
    assert list(tmp_path.glob("new/*.part")) == []
    lines = run.table(results).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "stderr", "n"]
    assert len(lines) == 1 + 4 + 3 and lines[1].split()[:2] == ["lambada", "acc"] and lines[1].endswith(" 7")


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_with_identical_results(lm, sets, cfg, tmp_path, monkeypatch):
    whole = run.evaluate(lm, ["lambada", "piqa"], cfg)
    out = tmp_path / "out.json"
    score, started = loglik.score, []

    def breaking(*args):
        for n, batch in enumerate(score(*args)):
            if len(started) == 1 and n == 2:
                raise Interrupted
            yield batch

    def counting(lm, items, work, *args):
        started.append([i for w in work for i in w.items])
        return breaking(lm, items, work, *args)

    monkeypatch.setattr(run.loglik, "score", counting)
    with pytest.raises(Interrupted):
        run.evaluate(lm, ["lambada", "piqa"], cfg, out)
    kept = out.with_name("out.json.items.jsonl")
    done = [json.loads(line)["item"] for line in kept.read_text().splitlines()]
    assert done and not out.exists()
    with open(kept, "a") as f:
        f.write('{"key": "torn')  # as if the machine had stopped in the middle of a line
    assert run.evaluate(lm, ["lambada", "piqa"], cfg, out) == whole
    assert sorted(done + started[1]) == list(range(7))
    # Once more: nothing is left to do.
    assert run.evaluate(lm, ["lambada", "piqa"], cfg, out) == whole
    assert started[3:] == [[], []]


def test_the_cache_is_for_one_model_and_setting(lm, sets, cfg, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    first = run.evaluate(lm, ["lambada"], cfg, out)
    other = dataclasses.replace(lm, params=lm.params | {"norm": lm.params["norm"].at[3].mul(1.5)})
    with pytest.raises(AtomError, match="holds results of another model"):
        run.evaluate(other, ["lambada"], cfg, out)
    out.unlink()
    changed = run.evaluate(other, ["lambada"], cfg, out)
    out.unlink()
    assert changed != first
    assert run.evaluate(lm, ["lambada"], config.override(cfg, ["lambada.limit=3"]), out)["lambada"].count == 3
    assert run.evaluate(lm, ["lambada"], cfg, out) == first
    keys = {json.loads(line)["key"] for line in (tmp_path / "out.json.items.jsonl").read_text().splitlines()}
    assert len(keys) == 3


def test_fingerprint_sees_every_bit(lm):
    first = fingerprint(lm)
    assert first == fingerprint(dataclasses.replace(lm, params=jax.tree.map(lambda x: x + 0, lm.params)))
    q = lm.params["layers"]["attn"]["q"]
    swapped = lm.params["embed"].at[np.array([3, 4])].set(lm.params["embed"][np.array([4, 3])])
    bit = jax.lax.bitcast_convert_type(q, np.uint32).at[1, 2, 0, 3].add(1)
    others = [
        dataclasses.replace(lm, params=lm.params | {"embed": swapped}),
        dataclasses.replace(lm, params=lm.params | {"embed": -lm.params["embed"]}),
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope_theta=5e5)),
        dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype("bfloat16"), lm.params)),
    ]
    layers = lm.params["layers"]
    flipped = layers | {"attn": layers["attn"] | {"q": jax.lax.bitcast_convert_type(bit, np.float32)}}
    others.append(dataclasses.replace(lm, params=lm.params | {"layers": flipped}))
    assert len({first, *map(fingerprint, others)}) == 6


def test_key_depends_on_the_items():
    items = [Item(np.arange(4, dtype=np.int32), 2), Item(np.arange(5, dtype=np.int32), 2)]
    variants = [items, items[::-1], items[:1], [items[0], Item(items[1].ids, 3)]]
    assert len({cache.key("m", "t", v, 64) for v in variants} | {cache.key("m", "t", items, 65)}) == 5


def test_cache_file_that_is_something_else(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(AtomError, match=r"items.jsonl is not a cache"):
        cache.ItemCache(path, "k")
    path.unlink()
    path.mkdir()
    with pytest.raises(AtomError, match=r"items.jsonl: Is a directory"):
        cache.ItemCache(path, "k")


def test_scores_survive_exactly(tmp_path):
    score = Score(float(np.float32(-1.2345678)) - 1e-13, False)
    first = cache.ItemCache(tmp_path / "c", "k")
    first.add([3], [score])
    first.close()
    assert cache.ItemCache(tmp_path / "c", "k").done == {3: score}
    assert cache.ItemCache(tmp_path / "c", "other").done == {}


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(AtomError, match="file"):
        (tmp_path / "file").write_text("")
        cache.write_json(tmp_path / "file" / "out.json", {})


def test_bad_settings(lm, sets):
    for setting, message in [
        ("front=maybe", "front=maybe"),
        ("max_length=1", "at least 2"),
        ("batch_tokens=0", "batch_tokens"),
        ("bpb.context=99", "does not fit"),
        ("bpb.split=dev", "expected one of train, validation"),
    ]:
        with pytest.raises(AtomError, match=message):
            cfg = run.resolve(config.override(EvalConfig(), [setting]), "nowhere")
            run.evaluate(lm, ["bpb"], cfg)
    with pytest.raises(AtomError, match="the tasks are bpb, lambada"):
        run.evaluate(lm, ["lambda"], EvalConfig())
    with pytest.raises(AtomError, match="has no tokenizer"):
        run.evaluate(dataclasses.replace(lm, tokenizer=None), ["lambada"], EvalConfig())


def test_a_training_directory_says_what_it_read(tmp_path):
    data = config.to_json(DataConfig(sources=("pystdlib",), seq_len=96))
    (tmp_path / "experiment.json").write_text(json.dumps({"kind": "Experiment", "data": data}))
    for path in (tmp_path, tmp_path / "checkpoints" / "100"):
        cfg = run.resolve(EvalConfig(), str(path))
        assert cfg.bpb.sources == ("pystdlib",) and cfg.bpb.split == "validation" and cfg.max_length == 96
    asked = config.override(EvalConfig(), ["bpb.sources=austen", "max_length=32"])
    assert run.resolve(asked, str(tmp_path)) == asked
    elsewhere = run.resolve(EvalConfig(), str(tmp_path / "other"))
    assert elsewhere.bpb.sources == ("austen",) and elsewhere.max_length == 0
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(AtomError, match="no readable data configuration"):
        run.resolve(EvalConfig(), str(tmp_path))


def test_front_token(lm, sets):
    def fronts(*settings):
        encoder = run.make_encoder(lm, config.override(EvalConfig(), list(settings)))
        return encoder.pair("a", " b").items[0].ids[0] == 256

    assert fronts() and fronts("front=yes") and not fronts("front=no")
    assert run.make_encoder(lm, EvalConfig()).length == lm.config.max_length
    long = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=1 << 20))
    assert run.make_encoder(long, EvalConfig()).length == 2048


def test_several_devices(lm, sets, cfg, monkeypatch):
    alone = run.evaluate(lm, ["piqa"], cfg)["piqa"]
    monkeypatch.setattr(run.jax, "devices", jax.local_devices)
    spread = run.evaluate(lm, ["piqa"], config.override(cfg, ["mesh.fsdp=2", "mesh.tensor=2"]))["piqa"]
    assert spread.metrics == alone.metrics


def test_missing_data(lm, cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_EVALDATA", str(tmp_path / "none"))
    with pytest.raises(AtomError, match="make evaldata"):
        run.evaluate(lm, ["lambada"], cfg)
