"""Mutants of small valid files: every reader takes them or refuses them in one sentence, with bounded work."""

import json
import random
import shutil
import struct

import jax
import numpy as np
import pytest
import tokenizers as tk

import atom_jax
from atom_jax import checkpoint
from atom_jax.checkpoint import adapters, gguf_import, store
from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.data.sources import open_source
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.training import record
from atom_jax.typing import LM
from tests.checkpoint.conftest import write_gguf
from tests.checkpoint.test_adapters import without
from tests.checkpoint.test_dms_checkpoints import OBSERVED, make
from tests.reliability.mutants import COUNT, damaged, json_mutants, survives, twisted


def fuzz(file, mutate, read, least=0, most=COUNT - 1):
    """Overwrites `file` by mutants of what it holds and reads each; of COUNT mutants `least` to `most` must be
    readable. Each has a seed of its own, so that one of many can be made again."""
    raw, taken = file.read_bytes(), 0
    assert survives(read, "unchanged"), "the file was not valid to begin with"
    for seed in range(COUNT):
        file.write_bytes(mutate(raw, random.Random(seed)))
        taken += survives(read, f"{file.name}, mutant {seed}")
    assert least <= taken <= most


@pytest.fixture
def llama(golden, tmp_path):
    target = tmp_path / "llama"
    shutil.copytree(golden / "hf_tiny" / "llama", target)
    (target / "io.safetensors").unlink()
    return target


def read_all(path):
    source = SafetensorsSource(path)
    return {name: source.read(name) for name in source.infos}


def header_mutants(raw, rng):
    """A safetensors file whose header was changed as JSON, or in its bytes."""
    if rng.randrange(2):
        return damaged(raw, rng, head=2000)
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(twisted(json.loads(raw[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def test_safetensors(tmp_path):
    atom_jax.checkpoint.safetensors_io.write_file(
        {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(5), "c": np.zeros((2, 2), np.float16)},
        tmp_path / "model.safetensors",
    )
    fuzz(tmp_path / "model.safetensors", header_mutants, lambda: read_all(tmp_path))


def test_index_of_shards(llama, tmp_path):
    checkpoint.save_hf(checkpoint.load(llama), tmp_path / "many", shard_bytes=150_000)
    fuzz(tmp_path / "many" / "model.safetensors.index.json", json_mutants, lambda: read_all(tmp_path / "many"))


def test_config(llama):
    fuzz(llama / "config.json", json_mutants, lambda: checkpoint.load(llama), least=1)


@pytest.mark.parametrize("family", ["bolmo", "dms/separate_alpha", "hf_tiny/olmo3", "hf_tiny/qwen3"])
def test_configs_of_other_families(golden, tmp_path, family):
    shutil.copy(golden / family / "config.json", tmp_path / "config.json")
    fuzz(tmp_path / "config.json", json_mutants, lambda: checkpoint.load_config(tmp_path), least=1)


def test_config_of_an_hnet(golden, tmp_path):
    table = json.loads((golden / "hnet" / "configs.json").read_text())["mt_2stage"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    fuzz(tmp_path / "config.json", json_mutants, lambda: checkpoint.load_config(tmp_path), least=1)


def test_generation_config(llama):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "temperature": 0.6}
    (llama / "generation_config.json").write_text(json.dumps(ids))
    fuzz(llama / "generation_config.json", json_mutants, lambda: checkpoint.load_config(llama), least=1)


def small_tokenizer():
    made = tk.Tokenizer(tk.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tk.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return made.to_str()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_tokenizer(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(small_tokenizer())
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).write_text(json.dumps(tokens))

    def read():
        tokenizer = JsonTokenizer(tmp_path)
        ids, _ = tokenizer.spans("abba <s>")
        tokenizer.decode([*ids, *tokenizer.front])

    fuzz(tmp_path / name, json_mutants, read, least=1)


def test_gguf_bytes(llama_arrays, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_arrays)
    fuzz(path, lambda raw, rng: damaged(raw, rng, head=6000), lambda: checkpoint.load(path))


def test_gguf_metadata(llama_arrays, tmp_path, monkeypatch):
    """Values of other types and sizes under the right names, as a whole file that says so."""
    path = write_gguf(tmp_path / "m.gguf", llama_arrays)
    facts = GGUFFile(path).metadata
    real = gguf_import.GGUFFile

    class Changed(real):
        def __init__(self, path):
            super().__init__(path)
            self.metadata = twisted(facts, random.Random(seed))

    monkeypatch.setattr(gguf_import, "GGUFFile", Changed)
    for seed in range(COUNT):
        survives(lambda: checkpoint.load(path), f"metadata, mutant {seed}")


def test_orbax_note(tmp_path):
    cfg = transformer.TransformerConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24)
    lm = LM(cfg, atom_jax.params.init(jax.random.key(0), transformer.spec(cfg)), ByteTokenizer())
    store.save_model(tmp_path / "model", lm)
    fuzz(tmp_path / "model" / "model.json", json_mutants, lambda: store.load_config(tmp_path / "model"), least=1)


def test_adapter(tmp_path):
    lm = make(OBSERVED)
    adapters.save_adapter(lm, tmp_path / "adapter")
    base = without(lm)
    read = lambda: adapters.load_adapter(base, tmp_path / "adapter")  # noqa: E731
    fuzz(tmp_path / "adapter" / "adapter.json", json_mutants, read, least=1)


def test_jsonl(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} äß", "n": i}) + "\n" for i in range(20)))

    def read():
        corpus = open_source(str(path), "all")
        for i in range(len(corpus)):
            corpus.read(i).decode()

    fuzz(path, damaged, read)


def test_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "kind": "train", "loss": 1.5, "bits_per_byte": 2.0} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def mutate(raw, rng):
        if rng.randrange(2):
            return damaged(raw, rng)
        kept = [json.loads(line) for line in raw.splitlines()]
        return "".join(json.dumps(line) + "\n" for line in twisted(kept, rng)).encode()

    def read():
        for line in record.read(path):
            assert type(line["step"]) is int and isinstance(line["kind"], str)
        record.rewind(path, 3)

    fuzz(path, mutate, read, least=COUNT, most=COUNT)
