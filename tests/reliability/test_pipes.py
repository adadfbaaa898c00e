"""Pipes and devices where a file is expected: refused at once by every reader, where opening them would wait."""

import os
import shutil
import signal

import jax
import pytest

import atom_jax
from atom_jax import checkpoint, config
from atom_jax import params as params_lib
from atom_jax.__main__ import main
from atom_jax.checkpoint import adapters, store
from atom_jax.data import images
from atom_jax.data.sources import open_source
from atom_jax.evaluation.reports import summary
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.training import record
from atom_jax.typing import LM, AtomError
from tests.checkpoint.test_adapters import without
from tests.checkpoint.test_dms_checkpoints import OBSERVED, make
from tests.reliability.test_fuzz import small_tokenizer


@pytest.fixture(autouse=True)
def never_waits():
    """Ends a test that waits for the other end of a pipe."""

    def end(*_):
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "device"])
def replaced(request):
    """Puts a pipe, or a device without an end, in the place of a file."""

    def replace(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")

    return replace


@pytest.fixture
def hf(golden, tmp_path):
    target = tmp_path / "llama"
    shutil.copytree(golden / "hf_tiny" / "llama", target)
    (target / "generation_config.json").write_text("{}")
    (target / "tokenizer.json").write_text(small_tokenizer())
    return target


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_hugging_face_directories(hf, replaced, name):
    replaced(hf / name)
    with pytest.raises(AtomError):
        checkpoint.load(hf)


def test_indexes_and_shards(hf, tmp_path, replaced):
    checkpoint.save_hf(checkpoint.load(hf), tmp_path / "many", shard_bytes=150_000)
    shards = sorted((tmp_path / "many").glob("model-*"))
    for path in (shards[1], tmp_path / "many" / "model.safetensors.index.json"):
        replaced(path)
        with pytest.raises(AtomError, match="not a regular file"):
            checkpoint.load(tmp_path / "many")


def test_tokenizers(tmp_path, replaced):
    replaced(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(AtomError, match="not a regular file"):
            JsonTokenizer(path)


def test_gguf(tmp_path, replaced):
    pytest.importorskip("gguf", reason="needs the gguf extra")
    from atom_jax.checkpoint.gguf_file import GGUFFile

    replaced(tmp_path / "m.gguf")
    with pytest.raises(AtomError, match="not a regular file"):
        GGUFFile(tmp_path / "m.gguf")
    with pytest.raises(AtomError):
        checkpoint.load(tmp_path / "m.gguf")


def test_orbax_directories_and_adapters(tmp_path, replaced):
    cfg = transformer.TransformerConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24)
    store.save_model(
        tmp_path / "m", LM(cfg, params_lib.init(jax.random.key(0), transformer.spec(cfg)), ByteTokenizer())
    )
    replaced(tmp_path / "m" / "model.json")
    with pytest.raises(AtomError, match="not a regular file"):
        atom_jax.load(tmp_path / "m")
    lm = make(OBSERVED)
    adapters.save_adapter(lm, tmp_path / "adapter")
    for name in ("adapter.safetensors", "adapter.json"):
        replaced(tmp_path / "adapter" / name)
        with pytest.raises(AtomError):
            adapters.load_adapter(without(lm), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.jsonl.xz", "a"])
def test_texts(tmp_path, replaced, name):
    replaced(tmp_path / name)
    with pytest.raises(AtomError, match="not a regular file"):
        open_source(str(tmp_path / name), "all")
    with pytest.raises(AtomError):
        open_source(str(tmp_path), "all")


def test_runs(tmp_path, replaced):
    for name in ("metrics.jsonl", "experiment.json", "config.py"):
        replaced(tmp_path / name)
    with pytest.raises(AtomError, match="not a regular file"):
        record.read(tmp_path / "metrics.jsonl")
    with pytest.raises(AtomError):
        summary.next_commands(str(tmp_path))
    with pytest.raises(AtomError):
        config.load_file(str(tmp_path / "config.py"))


def test_the_text_of_a_command(hf, tmp_path, replaced, capsys):
    replaced(tmp_path / "text")
    assert main(["atom_jax", "units", f"--checkpoint={hf}", f"--file={tmp_path / 'text'}"]) == 1
    assert "not a regular file" in capsys.readouterr().err


def test_images(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(AtomError, match=r"not an \.npz file"):
        images.parse(f"{tmp_path}/a.npz").images()
