"""eval.py as a user runs it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.data.config import DataConfig
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.typing import LM
from tests import quick
from tests.evaluation.conftest import lm  # noqa: F401 (a fixture)

ROOT = pathlib.Path(__file__).resolve().parent.parent


def evaluate(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": quick.FLAGS, **environment}
    command = [sys.executable, "eval.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(lm, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("model") / "hf"
    atom_jax.save_hf(lm, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("It is a truth universally acknowledged. " * 5)
    return path


def test_prints_a_table_and_writes_json(checkpoint, text, tmp_path):
    out = tmp_path / "out.json"
    settings = ["--set", f"bpb.sources={text}", "--set=bpb.split=all", "max_length=32"]
    done = evaluate(f"--checkpoint={checkpoint}", "--tasks=bpb", f"--out={out}", *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    bpb = report["tasks"]["bpb"]["metrics"]["bpb"]
    assert done.stdout.splitlines()[1].split()[:3] == ["bpb", "bpb", f"{bpb['value']:.4f}"]
    assert report["config"]["max_length"] == 32 and report["config"]["bpb"]["split"] == "all"
    assert "tok/s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=bpb"], "--checkpoint is missing"),
        (["--compile_only"], "expected either --checkpoint or --config"),
        (["--checkpoint=CKPT", "--tasks=bpb,lambda"], "--tasks: no task 'lambda'; the tasks are bpb, lambada"),
        (["--checkpoint=CKPT", "--tasks=lambada"], "make evaldata"),
        (["--checkpoint=CKPT", "--tasks=bpb", "oops"], "--set oops: expected NAME=VALUE"),
        (["--checkpoint=/no/such/model", "--tasks=bpb"], "/no/such/model"),
        (["--checkpoint=CKPT", "--tasks=bpb", "--adapter=nothing"], "adapter 'nothing' is neither"),
        (["--checkpoint=CKPT", "--tasks=bpb", "--out=CKPT/config.json/out.json"], "config.json"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, tmp_path, arguments, message):
    arguments = [a.replace("CKPT", str(checkpoint)) for a in arguments]
    done = evaluate(*arguments, ATOM_EVALDATA=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.startswith("eval.py: ")
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_adapters(lm, checkpoint, text, tmp_path):  # noqa: F811
    cfg = dataclasses.replace(lm.config, memory=DMS(window=1, offset=-5.0))
    evictors = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), lm.tokenizer)
    atom_jax.save_adapter(evictors, tmp_path / "adapter")
    settings = ["--tasks=bpb", "--set", f"bpb.sources={text}", "bpb.split=all", "max_length=32"]
    runs = [
        evaluate(f"--checkpoint={checkpoint}", *more, *settings)
        for more in ([], [f"--adapter={tmp_path / 'adapter'}"])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    assert runs[0].stdout != runs[1].stdout


def test_training_directory(lm, tmp_path):  # noqa: F811
    store = pytest.importorskip("atom_jax.checkpoint.store")
    store.save_model(tmp_path, lm)
    (tmp_path / "experiment.json").write_text(json.dumps({"data": config.to_json(DataConfig(seq_len=32))}))
    done = evaluate(f"--checkpoint={tmp_path}", "--tasks=bpb", "--set=bpb.limit=5", f"--out={tmp_path}/eval.json")
    assert done.returncode == 0, done.stderr
    used = json.loads((tmp_path / "eval.json").read_text())["config"]
    assert used["bpb"]["sources"] == ["austen"] and used["max_length"] == 32
    assert all("tok/s" in line for line in done.stderr.splitlines() if line)


def test_smollm2_reads_english(tmp_path):
    model = ROOT / "models" / "smollm2-135m-instruct"
    if not model.is_dir():
        pytest.skip("SmolLM2 is not here: run `make smollm2`")
    done = evaluate(
        f"--checkpoint={model}",
        "--tasks=bpb",
        "--set=bpb.limit=2",
        "max_length=128",
        "batch_tokens=256",
        f"--out={tmp_path}/out.json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["tasks"]["bpb"]["metrics"]["bpb"]["value"] < 1.3
