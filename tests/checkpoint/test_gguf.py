"""GGUF: tensors, rotary row order, tokenizers, damaged files, and the real SmolLM2."""

import json
import pathlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from atom_jax import checkpoint
from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.checkpoint.gguf_import import GGUFSource
from atom_jax.checkpoint.gguf_tokenizer import tokenizer_files
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SMOLLM2 = pathlib.Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"


def test_rows_metadata_and_tokenizer(llama_arrays, write, tmp_path):
    path = write(tmp_path / "m.gguf", llama_arrays)
    source = GGUFSource(path)
    assert source.infos.keys() == llama_arrays.keys()
    for name, x in llama_arrays.items():
        np.testing.assert_array_equal(source.read(name), x)
    lm = checkpoint.load(path)
    cfg = lm.config
    assert (cfg.norm_eps, cfg.rope_theta, cfg.rope_scaling, cfg.tie_embeddings) == (1e-5, 500000.0, None, True)
    assert (cfg.bos_id, cfg.eos_ids, cfg.vocab_size) == (0, (1,), 96)
    assert (lm.tokenizer.bos_id, lm.tokenizer.eos_ids, lm.tokenizer.vocab_size) == (0, (1,), 96)
    checkpoint.save_hf(lm, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    again = checkpoint.load(tmp_path / "hf")
    assert again.config == cfg and again.tokenizer.decode([0, 93, 1]) == "<|start|> <|end|>"


def test_a_configuration_is_read_without_the_weights(llama_arrays, write, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", llama_arrays)
    lm = checkpoint.load(path)
    monkeypatch.setattr(GGUFFile, "tensor", lambda *_: pytest.fail("reads a tensor"))
    cfg, tokenizer = checkpoint.load_config(str(path))
    assert cfg == lm.config and tokenizer.vocab_size == lm.tokenizer.vocab_size == 96


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_tensors_equal_the_gguf_package(llama_arrays, write, tmp_path, kind):
    quant = gguf.GGMLQuantizationType[kind]
    source = GGUFSource(write(tmp_path / "m.gguf", llama_arrays, quant=quant))
    for name in ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(llama_arrays[name], quant), quant)
        np.testing.assert_array_equal(source.read(name), expected)
    assert {row[2] for row in source.stored()} == {kind, "F32"}


def test_llama3_scaling_is_recovered_from_its_frequencies(llama_arrays, write, tmp_path):
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (8192 / wavelength - 1.0) / 3.0
    factors = np.where(smooth >= 1, 1.0, np.where(smooth <= 0, 32.0, 1 / ((1 - smooth) / 32.0 + smooth)))
    path = write(tmp_path / "m.gguf", llama_arrays, extra=[("rope_freqs.weight", factors.astype(np.float32))])
    scaling = checkpoint.load(path).config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_length) == ("llama3", 32.0, 8192)
    other = [("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32))]
    path = write(tmp_path / "n.gguf", llama_arrays, extra=other)
    with pytest.raises(AtomError, match="does not follow Llama 3's rule"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"pre": "mystery"}, "tokenizer.ggml.pre 'mystery' has no known splitting rule"),
        ({"eos": 96}, "eos_token_id 96 is not one of the 96 tokens"),
        ({"facts": {"expert_count": 8}}, "mixture-of-experts"),
        ({"facts": {"rope.dimension_count": 8}}, "partial rotary"),
        ({"facts": {"attention.head_count": 0}}, "attention.head_count is 0 where a positive number"),
        ({"facts": {"block_count": 5}}, r"9 missing tensors \(model.layers.4"),
        ({"facts": {"attention.head_count_kv": 4}}, r"'model.layers.0.self_attn.k_proj.weight' is \(32, 64\)"),
        ({"drop": ["blk.1.attn_v.weight"]}, r"1 missing tensor \(model.layers.1.self_attn.v_proj.weight\)"),
        ({"extra": [("blk.0.attn_q.bias", np.zeros(64, np.float32))]}, "unknown tensors .*blk.0.attn_q.bias"),
        ({"drop": ["token_embd.weight"]}, "no token_embd.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(llama_arrays, write, tmp_path, changes, message):
    with pytest.raises(AtomError, match=message):
        checkpoint.load(write(tmp_path / "m.gguf", llama_arrays, **changes))


def test_nan_is_named(llama_arrays, write, tmp_path):
    bad = llama_arrays["model.norm.weight"] * np.nan
    with pytest.raises(AtomError, match=r"m\.gguf: tensor 'output_norm.weight' holds NaN"):
        checkpoint.load(write(tmp_path / "m.gguf", {**llama_arrays, "model.norm.weight": bad}))


def test_without_the_gguf_package(llama_arrays, write, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", llama_arrays)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(AtomError, match=r"pip install 'atom-jax\[gguf\]'"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def small_file(llama_arrays, write, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    return write(path, {"model.norm.weight": llama_arrays["model.norm.weight"]}).read_bytes()


@FUZZ
@given(data=st.data())
def test_damaged_files_never_do_more_than_raise(small_file, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    raw = bytearray(small_file)
    kind = data.draw(st.sampled_from(["truncate", "flip", "length"]))
    if kind == "truncate":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 300))] = data.draw(st.integers(0, 255))
    else:
        at = data.draw(st.integers(8, 400))
        raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([2**63, 2**62, 2**40, 10**6, 0])))
    path.write_bytes(raw)
    try:
        file = GGUFFile(path)
        [file.tensor(name) for name in file.shapes]
    except AtomError as e:
        assert "m.gguf" in str(e)


def test_lying_array_lengths_end_at_once(tmp_path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path = tmp_path / "m.gguf"
    for item in (0, 4, 8):
        path.write_bytes(header + struct.pack("<IIQ", 9, item, 2**62))
        with pytest.raises(AtomError, match="runs past the end of the file"):
            GGUFFile(path)


def test_digits_are_split_before_whitespace_is_grouped(vocabulary):
    vocab, types, merges = vocabulary
    facts = {"model": "gpt2", "tokens": vocab, "token_type": types, "merges": merges}

    def pieces(pre, text):
        files = tokenizer_files({f"tokenizer.ggml.{k}": v for k, v in {**facts, "pre": pre}.items()}, "x")
        return Tokenizer.from_str(files["tokenizer.json"]).encode(text).tokens

    # GPT-2's rule leaves one line break to stand before the digit; SmolLM's splits digits off first.
    assert pieces("gpt-2", "\n\n1") == ["Ċ", "Ċ", "1"]
    assert pieces("smollm", "\n\n1") == ["ĊĊ", "1"]
    assert pieces("llama-bpe", "a 12<|end|>") == ["a", "Ġ", "1", "2", "<|end|>"]
    assert pieces("qwen2", "I'LL") == ["I", "'", "L", "L"]


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="needs the real weights: make smollm2")
def test_smollm2_has_the_official_tokenizer(golden):
    tk = JsonTokenizer(SMOLLM2)
    meta = json.loads((golden / "smollm2" / "meta.json").read_text())["texts"]
    io = load_file(golden / "smollm2" / "io.safetensors")
    assert (tk.bos_id, tk.eos_ids, tk.pad_id, tk.vocab_size) == (1, (2,), 2, 49152)
    for name, facts in meta.items():
        np.testing.assert_array_equal(tk.encode(facts["text"]), io[f"{name}.ids"])
        assert tk.decode(io[f"{name}.greedy32"]) == facts["greedy"]


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="needs the real weights: make smollm2")
def test_smollm2_says_what_it_is():
    source = SafetensorsSource(SMOLLM2)
    assert sum(np.prod(info.shape) for info in source.infos.values()) == 134_515_008
    config = json.loads((SMOLLM2 / "config.json").read_text())
    assert config["_name_or_path"] == "SmolLM2-135M-Instruct Q4_1, dequantized"
