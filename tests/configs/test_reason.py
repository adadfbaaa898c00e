"""configs/reason.py: a reasoner, its retrofits, and what they are asked for."""

import dataclasses
import json

import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.models import registry
from atom_jax.training import loop, start
from configs import reason

SMALL = ["data.weights=", "data.sources=reason:subset:letters=4:high=20:goal=40", "data.seq_len=128",
         "data.batch_size=8", "train.eval_every=3", "train.eval_batches=1"]  # fmt: skip


@pytest.mark.parametrize("name", reason.VARIANTS)
def test_variants_are_written_and_read(name):
    exp = config.load_file(f"configs/reason.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    assert exp.data.whole and exp.data.prompt_end == ";"


def test_the_reasoner_has_its_size():
    cfg = reason.subset().model
    assert 0.7e6 < params.count(registry.of(cfg).spec(cfg)) < 0.9e6


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("reason") / "run"
    exp = reason.tiny()
    loop.fit(dataclasses.replace(exp, train=dataclasses.replace(exp.train, steps=6, eval_every=6)), workdir)
    return workdir


def test_training_counts_chains_only_and_goes_on_with_memory(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(line.get("tokens", 0) < 8 * 128 for line in lines)
    memory = ["memory.window=4", "fit.windows=0", "fit.calibration=1", "fit.entries=20", "train.steps=3"]
    exp = start.configure("configs/reason.py:dms_4x", [f"init_from={trained}", *SMALL, *memory])
    loop.fit(exp, tmp_path / "dms")
    base, learned = atom_jax.load(str(trained)), atom_jax.load(str(tmp_path / "dms"))
    new = params.flatten(learned.params)
    for name, x in params.flatten(base.params).items():
        np.testing.assert_array_equal(x, new[name])
    assert learned.config.memory.name == "dms"


def test_stages_speak_the_same_words(tmp_path, one_device):
    few = reason.tiny()
    few = dataclasses.replace(few, train=dataclasses.replace(few.train, steps=2, eval_every=0))
    more = dataclasses.replace(few.data, sources=("reason:subset:letters=5:high=30:goal=60",))
    loop.fit(dataclasses.replace(few, data=more, first=few), tmp_path)
    one, two = (atom_jax.load(str(path)).tokenizer for path in (tmp_path / "first", tmp_path))
    text = "a 21 b 7 c 29 d 5 e 30 goal 56 ; e+"
    assert one.decode(one.encode(text)) == text and one.encode(text).tolist() == two.encode(text).tolist()


def test_reason_says_what_it_found(trained, capsys):
    flags = [f"--checkpoint={trained}", "--chains=2", "--length=24"]
    assert main(["atom_jax", "reason", *flags, "--problem=a 10 b 18 c 15 goal 28", "--show"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a 10 b 18 c 15 goal 28 ;") and "entries read" in out
    assert (
        main(["atom_jax", "reason", *flags, "--prompt=a 10", r"--answer=\w", "--json", "--memory=tova:budget=8"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert len(found["chains"]) == 2 and max(c["held"] for c in found["chains"]) <= 8 and found["right"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "--problem, --prompt or --file is missing"), (["--problem=a 1 b 2"], "expected a problem such as"),
     (["--problem=a 10 b 18 goal 99"], "lacks words"), (["--prompt=a", "--answer=("], "--answer"),
     (["--prompt=a", "--chains=0"], "chains"), (["--prompt=a", "--length=999999"], "exceed the"),
     (["--prompt=a", "--memory=lru"], "lru"), (["--prompt=a", "--vote=all"], "vote=all"),
     (["--prompt=a", "--stop=verified"], "nothing can check"), (["--prompt=a", "--problem=a"], "choose"),
     (["--problem=a 1 b 2 goal 3", "--puzzle=chess"], "chess"), (["--prompt=a", "--seed=-1e3"], "seed")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(trained, flags, message, capsys):
    assert main(["atom_jax", "reason", f"--checkpoint={trained}", *flags]) != 0
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
