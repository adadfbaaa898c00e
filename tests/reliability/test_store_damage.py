"""What disks, kills and second runs do to checkpoints."""

import json
import random
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import checkpoint
from atom_jax import params as params_lib
from atom_jax.checkpoint import checksums, cli, lock, store
from atom_jax.checkpoint.checksums import Damaged
from atom_jax.checkpoint.steps import steps
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

CFG = transformer.TransformerConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24)
NOTES = {"config": {"model": {"class": "TransformerConfig"}, "tokenizer": "bytes"}, "data": {"next": [3]}}
ABSTRACT = {
    "params": {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, "opt": {"step": jax.ShapeDtypeStruct((), jnp.int32)}
}  # fmt: skip


def trees(step: int):
    x = jax.random.normal(jax.random.key(step), (64, 64))
    return {"params": {"w": x}, "opt": {"step": jnp.int32(step)}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with store.Store(directory, keep=3) as s:
        for step in (1, 2, 3):
            s.save(step, trees(step), NOTES)
    return directory


@pytest.fixture
def mine(run, tmp_path):
    return shutil.copytree(run, tmp_path / "checkpoints")


def read(s: store.Store, step: int):
    s.notes(step, "config", "data")
    return step, s.restore(step, place(ABSTRACT))


def place(tree):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda step: truncate(largest(step / "params")),
    "zeroed": lambda step: largest(step / "params").write_bytes(bytes(largest(step / "params").stat().st_size)),
    "a flipped bit": lambda step: flip(largest(step / "params")),
    "a flipped bit of the optimiser": lambda step: flip(largest(step / "opt")),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "no opt": lambda step: shutil.rmtree(step / "opt"),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "no checksums and a short file": lambda step: (
        (step / checksums.FILE).unlink(),
        truncate(largest(step / "params")),
    ),
    "checksums that are none": lambda step: (step / checksums.FILE).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_intact_step_is_used(mine, damage):
    DAMAGE[damage](mine / "3")
    with store.Store(mine, keep=2) as s:
        (step, got), said = s.resume(lambda step: read(s, step))
        assert step == 2 and len(said) == 1 and "step 3" in said[0] and "step 2" in said[0]
        chex.assert_trees_all_equal(got, trees(2))
        assert (mine / "3.damaged").is_dir() and (mine / "1").is_dir()
        s.save(3, trees(3), NOTES)
    assert steps(mine) == [3, 2]
    assert (mine / "3.damaged").is_dir()


def test_two_damaged_steps(mine):
    for step in ("2", "3"):
        flip(largest(mine / step / "params"))
    with store.Store(mine, keep=1) as s:
        (step, _), said = s.resume(lambda step: read(s, step))
    assert step == 1 and len(said) == 2


def test_nothing_is_renamed_where_all_are_damaged(mine):
    for step in ("1", "2", "3"):
        flip(largest(mine / step / "params"))
    with store.Store(mine, keep=1) as s, pytest.raises(AtomError, match="step 3 is not intact, nor are the 2 before"):
        s.resume(lambda step: read(s, step))
    assert steps(mine) == [3, 2, 1]


def test_strays_are_no_steps(mine):
    (mine / "²").mkdir()
    (mine / "007").mkdir()
    (mine / "12").write_text("a file")
    (mine / "999").mkdir()
    with store.Store(mine, keep=3) as s:
        (step, _), said = s.resume(lambda step: read(s, step))
        assert step == 3 and len(said) == 1 and "999" in said[0]
        s.save(4, trees(4), NOTES)
    assert steps(mine) == [4, 3, 2]


def test_steps_of_a_bad_streak_do_not_displace_the_last_good_one(tmp_path):
    with store.Store(tmp_path / "c", keep=2) as s:
        for step in range(1, 6):
            s.save(step, trees(step), NOTES, suspect=step > 2)
    assert steps(tmp_path / "c") == [5, 4, 2]
    with store.Store(tmp_path / "c", keep=2) as s:
        s.save(6, trees(6), NOTES)
        s.save(7, trees(7), NOTES)
    assert steps(tmp_path / "c") == [7, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "m"
    lm = LM(CFG, params_lib.init(jax.random.key(0), transformer.spec(CFG)), ByteTokenizer())
    store.save_model(directory, lm)
    return directory, lm


def test_every_flipped_bit_is_seen(model, tmp_path):
    directory = shutil.copytree(model[0], tmp_path / "m")
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    rng, seen = random.Random(0), 0
    for _ in range(120):
        file = rng.choices(files, [p.stat().st_size for p in files])[0]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(AtomError):
            checksums.verify(directory)
        seen += 1
        file.write_bytes(good)
    assert seen == 120 and store.verify(directory)[1] > 10_000


def test_a_flipped_bit_is_not_loaded(model, tmp_path):
    directory = shutil.copytree(model[0], tmp_path / "m")
    np.testing.assert_array_equal(store.load_params(directory)[1]["embed"], model[1].params["embed"])
    flip(largest(directory / "params"))
    with pytest.raises(Damaged, match="checksum differs"):
        store.load_params(directory)


def test_a_model_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write", full)
    with pytest.raises(AtomError, match="No space left"):
        store.save_model(tmp_path / "m", model[1])
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    store.save_model(tmp_path / "m", model[1])


def test_a_directory_belongs_to_one_run(tmp_path):
    with (
        lock.locked(tmp_path),
        pytest.raises(AtomError, match=r"belongs to another run, process \d+ on"),
        lock.locked(tmp_path),
    ):
        pass
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["process"] > 0


def test_a_dead_run_holds_nothing(tmp_path):
    code = f"""
import pathlib, sys
from atom_jax.checkpoint import lock
with lock.locked(pathlib.Path({str(tmp_path)!r})):
    print("ready", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    with pytest.raises(AtomError, match=f"process {other.pid} on"), lock.locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with lock.locked(tmp_path):
        pass


def test_a_changed_tensor_is_named(model, tmp_path):
    checkpoint.save_hf(model[1], tmp_path / "hf")
    assert "are what was written" in cli.info(str(tmp_path / "hf"), verify=True)
    assert "are what was written" in cli.info(str(model[0]), verify=True)
    flip(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(Damaged, match=r"tensor 'model.* is not what was written"):
        checkpoint.load(tmp_path / "hf")
    with pytest.raises(Damaged):
        cli.info(str(tmp_path / "hf"), verify=True)
