"""Checkpoints made on the spot."""

from __future__ import annotations

import pytest

from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.checkpoint.tensors import TensorInfo

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def spelling_vocabulary():
    """96 tokens of a byte-level vocabulary that can only spell ASCII, with two merges."""
    characters = [chr(c) for c in range(0x21, 0x21 + 91)]
    return ["<|start|>", "<|end|>", *characters, "Ġ", "Ċ", "ĊĊ"], [3, 3] + [1] * 94, ["Ċ Ċ"]


def llama_cpp_order(w, heads):
    """Rows as llama.cpp stores them: the two halves of every head interleaved."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, arrays, *, quant=None, extra=(), drop=(), **changes):
    """A GGUF file of the golden Llama (4 layers, width 64, 4 query and 2 key/value heads)."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    writer = gguf.GGUFWriter(path, changes.get("arch", "llama"))
    facts = {"block_count": 4, "context_length": 256, "embedding_length": 64, "feed_forward_length": 128}
    facts |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16}
    for name, value in (facts | changes.get("facts", {})).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500000.0)
    vocab, types, merges = spelling_vocabulary()
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(vocab)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(changes.get("eos", 1))
    writer.add_chat_template("{{ messages }}")
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in changes.get("more", {}).items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for hf, x in arrays.items():
        name = hf.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        name = name.replace("model.layers", "blk")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name or "attn_k" in name:
            x = llama_cpp_order(x, 4 if "attn_q" in name else 2)
        if name in drop:
            continue
        if quant is not None and x.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(x, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, x)
    for name, x in extra:
        writer.add_tensor(name, x)
    for call in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, call)()
    return path


class Arrays:
    """A TensorSource over a dictionary of numpy arrays."""

    label = "arrays"

    def __init__(self, arrays):
        self.arrays = arrays
        self.infos = {name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()}

    def read(self, name):
        return self.arrays[name]


@pytest.fixture(scope="session")
def in_memory():
    """Makes a TensorSource of a dictionary."""
    return Arrays


@pytest.fixture(scope="session")
def vocabulary():
    """Tokens, their types and merges of a small byte-level vocabulary."""
    return spelling_vocabulary()


@pytest.fixture(scope="session")
def llama_arrays(golden):
    """The golden Llama's tensors under their published names."""
    source = SafetensorsSource(golden / "hf_tiny" / "llama")
    return {name: source.read(name) for name in source.infos}


@pytest.fixture(scope="session")
def write():
    """Writes a GGUF file of the golden Llama, with changes."""
    return write_gguf
