"""train.py as a user runs it: kills, Ctrl-C, several processes, bad input."""

import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import logging

from atom_jax.__main__ import script
from atom_jax.training.record import read
from tests import quick

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 240
SETTINGS = ["train.eval_every=0", "train.checkpoint_every=20", "train.keep=99", "optim.schedule=constant"]
SETTINGS += [f"train.steps={STEPS}", "data.seq_len=16"]


def begin(workdir: pathlib.Path, *more: str, settings=SETTINGS, flags=()) -> subprocess.Popen:
    """Starts the script with one CPU device."""
    env = dict(os.environ, XLA_FLAGS=quick.FLAGS)
    command = [sys.executable, "train.py", "--config=configs/lm.py:tiny", f"--workdir={workdir}", *flags]
    command += [f"--set={s}" for s in [*settings, *more]]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, code: int = 0) -> str:
    """Waits; returns what was printed to stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return err


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = read(workdir / "metrics.jsonl")
    assert [x["step"] for x in lines] == sorted({x["step"] for x in lines}), "a step is missing or there twice"
    return {x["step"]: x["loss"] for x in lines}


def reach(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Returns once the run has logged `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["step"] >= step for line in read(workdir / "metrics.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed, and its losses."""
    workdir = tmp_path_factory.mktemp("whole")
    end(begin(workdir))
    found = losses(workdir)
    assert list(found) == list(range(1, STEPS + 1))
    return workdir, found


def test_kills_and_interrupts_leave_no_trace_in_the_losses(whole, tmp_path):
    # Wherever it strikes: in a step, while a checkpoint is saved, or between. Past step 40 there is a whole one.
    first = begin(tmp_path)
    reach(first, tmp_path, random.randint(45, 90))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    killed = read(tmp_path / "metrics.jsonl")[-1]["step"]
    second = begin(tmp_path)
    reach(second, tmp_path, killed + random.randint(5, 40))
    second.send_signal(signal.SIGINT)
    err = end(second, 130)
    (stopped,) = (
        int(line.split()[3].rstrip(";")) for line in err.split("\n") if line.startswith("stopped after step")
    )
    assert "continuing from step" in err and "the same command continues" in err
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir() and (tmp_path / "plots" / "loss.png").exists()
    assert max(losses(tmp_path)) == stopped
    assert f"continuing from step {stopped}" in end(begin(tmp_path))
    assert losses(tmp_path) == whole[1]


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_two_processes_equal_one(whole, tmp_path, axis):
    """Each with half of the rows, or with half of the heads of all rows."""
    before, expected = whole
    shutil.copytree(before / "checkpoints" / "20", tmp_path / "checkpoints" / "20")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # One process began; two with a device each, joined over the loopback interface, take over; then one again.
    join = ["--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    both = [begin(tmp_path, f"mesh.{axis}=2", flags=[*join, f"--process_id={i}"]) for i in range(2)]
    reach(both[0], tmp_path, 50)
    both[1].send_signal(signal.SIGTERM)  # to one of them, and both stop after the same step
    errors = [end(process, 143) for process in both]
    assert "continuing from step 20" in errors[0] and "continuing" not in errors[1]
    stopped = max(losses(tmp_path))
    assert f"continuing from step {stopped}" in end(begin(tmp_path, f"train.steps={stopped + 10}"))
    found = losses(tmp_path)
    assert list(found) == list(range(21, stopped + 11))
    np.testing.assert_allclose([found[i] for i in found], [expected[i] for i in found], rtol=1e-4)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config=configs/nothing.py", "--workdir=x"], "there is no file configs/nothing.py"),
        (["--config=configs/lm.py:huge", "--workdir=x"], "no variant 'huge'"),
        (["--config=configs/lm.py:tiny"], "--workdir is missing"),
        (["--config=configs/lm.py:tiny", "--workdir=x", "--set=optim.lr=1"], "no field 'lr'"),
        (["--config=configs/lm.py:tiny", "--workdir=x", "--set", "train.steps=1", "optim.lr=1"], "no field 'lr'"),
        (["--config=configs/lm.py:tiny", "--workdir=x", "extra"], "unexpected argument 'extra'"),
        (["--config=configs/lm.py:tiny", "--compile_only", "--topology=v5p:4x4x4x4x4"], "--topology="),
    ],
)
def test_bad_input_is_one_sentence(argv, words, capfd, monkeypatch, tmp_path):
    run_main(monkeypatch, tmp_path, argv, code=1)
    err = capfd.readouterr().err
    assert err.startswith("train.py: ") and words in err and err.count("\n") == 1


def test_compile_only_reports_memory(capfd, monkeypatch, tmp_path):
    run_main(monkeypatch, tmp_path, ["--config=configs/lm.py:tiny", "--compile_only"], code=0)
    out = capfd.readouterr().out
    assert " parameters on 8 x cpu (data 8, fsdp 1, context 1, tensor 1), 8 rows of 32 tokens" in out
    assert "total" in out and "GiB per chip" in out and "operations" in out


def test_compile_only_fails_where_memory_is_short(capfd, monkeypatch, tmp_path):
    from atom_jax.aot import report, topology

    monkeypatch.setattr(report, "devices", lambda _: (jax.devices(), topology.Chip(1e-4, 1e12)))
    run_main(monkeypatch, tmp_path, ["--config=configs/lm.py:tiny", "--compile_only", "--topology=v5e:2x4"], code=1)
    assert "of 0.0001: does not fit" in (out := capfd.readouterr().out) and "--set " in out


def run_main(monkeypatch, tmp_path, argv, code: int) -> None:
    """The script in this process."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "set_verbosity", lambda level: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    assert script("train", ["train.py", *argv]) == code
