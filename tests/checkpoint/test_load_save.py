"""load and save_hf: whole directories, the official code's view of them, and failures that lose nothing."""

import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import checkpoint
from atom_jax.checkpoint import atomic, safetensors_io
from atom_jax.kvcache import policies
from atom_jax.models import registry
from atom_jax.tokenizers.bytes import ByteTokenizer
from atom_jax.typing import AtomError, Batch

FAMILIES = ["llama", "qwen3", "olmo2", "olmo3"]


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def tensors(path):
    source = safetensors_io.SafetensorsSource(path)
    return {name: source.read(name).tobytes() for name in source.infos}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_what_was_loaded(golden, tmp_path, family):
    source = golden / "hf_tiny" / family
    lm = checkpoint.load(source)
    assert lm.family == family and lm.tokenizer is None
    for name, shard_bytes in (("one", 10**9), ("many", 150_000)):
        checkpoint.save_hf(lm, tmp_path / name, shard_bytes=shard_bytes)
        again = checkpoint.load(tmp_path / name)
        assert tensors(tmp_path / name) == tensors(source)
        assert again.config == lm.config
    assert len(list((tmp_path / "many").glob("model-*"))) > 1


def test_a_model_is_short_to_look_at_and_says_when_it_replaces_another(golden, tmp_path, monkeypatch):
    lm, said = checkpoint.load(golden / "hf_tiny" / "llama"), []
    assert repr(lm).startswith("LM(llama: ") and repr(lm).endswith(" parameters (float32), tokenizer: none)")
    monkeypatch.setattr(checkpoint.logging, "warning", lambda *words: said.append(words[0] % words[1:]))
    for _ in range(2):
        checkpoint.save_hf(lm, tmp_path / "a")
    said = [line for line in said if "replaced" in line]
    assert said == [f"{tmp_path / 'a'}: the model that was there is replaced"]


def test_another_memory(golden):
    path = golden / "hf_tiny" / "llama"
    assert checkpoint.load(path, memory="tova:budget=7").config.memory == policies.parse("tova:budget=7")
    assert checkpoint.load(path, memory=policies.parse("quest:budget=64")).config.memory == policies.parse(
        "quest:budget=64"
    )
    with pytest.raises(AtomError, match="memory 'tovo': expected none"):
        checkpoint.load("nowhere", memory="tovo")
    with pytest.raises(AtomError, match="memory: expected none or one of"):
        checkpoint.load(path, memory=3)


@pytest.mark.parametrize("path", [3, None, b"x"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(AtomError, match="path: expected that of a checkpoint, as a text, got"):
        checkpoint.load(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_official_code_computes_the_same_from_what_was_saved(golden, tmp_path, family):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    checkpoint.save_hf(checkpoint.load(golden / "hf_tiny" / family), tmp_path, shard_bytes=200_000)
    kwargs = {"dtype": torch.float32, "output_loading_info": True}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert not any(report.values())
    io = load_file(golden / "hf_tiny" / family / "io.safetensors")
    with torch.no_grad():
        logits = model(torch.tensor(io["input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, io["logits"], atol=5e-5)


def test_options_of_the_rotary_embedding_survive_the_official_code(golden, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    lm = checkpoint.load(golden / "hf_tiny" / "olmo3")
    # An uncommon base shows whether sliding layers get it too.
    cfg = dataclasses.replace(lm.config, rope_theta=12345.0, layer_types=("sliding", "full") * 2, sliding_window=7)
    checkpoint.save_hf(dataclasses.replace(lm, config=cfg), tmp_path)
    ids = load_file(golden / "hf_tiny" / "olmo3" / "io.safetensors")["input_ids"][:1]
    positions = jnp.arange(ids.shape[1])[None]
    batch = Batch(ids=jnp.asarray(ids, jnp.int32), positions=positions, segments=jnp.ones_like(positions))
    ours = registry.of(cfg).apply(lm.params, batch, cfg=cfg)[0].logits
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        theirs = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_dtype_converts_parameters_and_computation(golden, tmp_path):
    lm = checkpoint.load(golden / "hf_tiny" / "qwen3", dtype="bfloat16")
    assert lm.config.dtype == "bfloat16" and lm.params["embed"].dtype == jnp.bfloat16
    checkpoint.save_hf(lm, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = checkpoint.load(tmp_path)
    assert again.config.dtype == "bfloat16" and again.params["embed"].dtype == jnp.bfloat16
    assert checkpoint.load(tmp_path, dtype=jnp.float32).config.dtype == "float32"
    for dtype in ("int8", "fast"):
        with pytest.raises(AtomError, match=f"dtype {dtype} is not supported"):
            checkpoint.load(tmp_path, dtype=dtype)


def test_a_byte_model_remembers_its_tokenizer(golden, tmp_path, monkeypatch):
    lm = dataclasses.replace(checkpoint.load(golden / "hf_tiny" / "llama"), tokenizer=ByteTokenizer())
    checkpoint.save_hf(lm, tmp_path)
    said = []
    monkeypatch.setattr(checkpoint.logging, "warning", lambda text, *args: said.append(text % args))
    assert checkpoint.load(tmp_path).tokenizer.name == "bytes"
    assert "tokenizer has 264 ids, the embedding 96 rows" in said[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "atom_tokenizer": "/etc"}))
    with pytest.raises(AtomError, match="atom_tokenizer is '/etc'"):
        checkpoint.load(tmp_path)


def test_generation_config_has_the_last_word_on_stopping(golden, tmp_path):
    shutil.copytree(golden / "hf_tiny" / "llama", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    lm = checkpoint.load(tmp_path / "m")
    assert lm.config.eos_ids == (5, 6)
    checkpoint.save_hf(lm, tmp_path / "n")
    assert json.loads((tmp_path / "n" / "config.json").read_text())["eos_token_id"] == [5, 6]


class Full(OSError):
    """What a full disk raises."""

    def __init__(self):
        super().__init__(28, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["second shard", "flush", "move"])
def test_a_failed_save_changes_nothing(golden, tmp_path, monkeypatch, existing, fails):
    target = tmp_path / "model"
    lm = checkpoint.load(golden / "hf_tiny" / "llama")
    if existing:
        checkpoint.save_hf(lm, target)
        (target / "notes.txt").write_text("mine")
    before = contents(target) if existing else None
    save_file, done = safetensors_io.save_file, []

    def save_once(arrays, file, **kwargs):
        if fails == "second shard" and done:
            file.write_bytes(b"half")
            raise Full()
        done.append(file)
        return save_file(arrays, file, **kwargs)

    def no_space(*args):
        raise Full()

    monkeypatch.setattr(safetensors_io, "save_file", save_once)
    if fails == "flush":
        monkeypatch.setattr(atomic.os, "fsync", no_space)
    if fails == "move":
        monkeypatch.setattr(atomic.os, "replace", no_space)
        monkeypatch.setattr(atomic.os, "rename", no_space)
    with pytest.raises(AtomError, match=r"model: could not be saved \(No space left on device\)") as e:
        checkpoint.save_hf(lm, target, shard_bytes=150_000)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == (["model"] if existing else [])
    if existing:
        assert contents(target) == before
        checkpoint.load(target)


def test_saving_over_a_model_replaces_it_and_keeps_other_files(golden, tmp_path):
    checkpoint.save_hf(checkpoint.load(golden / "hf_tiny" / "llama"), tmp_path, shard_bytes=150_000)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("of the model before")
    lm = checkpoint.load(golden / "hf_tiny" / "olmo2")
    checkpoint.save_hf(lm, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert tensors(tmp_path) == tensors(golden / "hf_tiny" / "olmo2")


def test_saved_files_have_ordinary_permissions(golden, tmp_path):
    checkpoint.save_hf(checkpoint.load(golden / "hf_tiny" / "llama"), tmp_path / "model")
    plain = tmp_path / "plain"
    plain.touch()
    assert {p.stat().st_mode for p in (tmp_path / "model").iterdir()} == {plain.stat().st_mode}


def test_places_that_cannot_be_written(golden, tmp_path):
    lm = checkpoint.load(golden / "hf_tiny" / "llama")
    (tmp_path / "file").touch()
    with pytest.raises(AtomError, match="it is a file"):
        checkpoint.save_hf(lm, tmp_path / "file")
    with pytest.raises(AtomError, match="cannot save there"):
        checkpoint.save_hf(lm, tmp_path / "file" / "below")


def test_paths_that_hold_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    for path, message in [
        ("empty", "not a Hugging Face directory"),
        ("text.txt", "not a Hugging Face directory"),
        ("empty/nothing", "no such file or directory"),
        ("./nowhere", "no such file or directory"),
    ]:
        with pytest.raises(AtomError, match=f"{path}: {message}"):
            checkpoint.load(path)
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    for path in ("empty", "empty/pytorch_model.bin"):
        with pytest.raises(AtomError, match="pickled weights are never loaded"):
            checkpoint.load(path)


def test_hub_ids(golden, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub extra")
    monkeypatch.chdir(tmp_path)
    local = golden / "hf_tiny"
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: local / name.split("/")[1])
    assert checkpoint.load("some-org/llama").family == "llama"

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(AtomError, match=r"some-org/llama: .*hub did not deliver it \(no route\)$"):
        checkpoint.load("some-org/llama")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(golden, tmp_path):
    shutil.copytree(golden / "hf_tiny" / "llama", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").chmod(0)
    with pytest.raises(AtomError, match="cannot be read"):
        checkpoint.load(tmp_path / "m")
