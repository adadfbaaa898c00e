"""Imports Llama-family GGUF files: as tensors under Hugging Face names, a config.json and tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.checkpoint.gguf_tokenizer import special_id, tokenizer_files
from atom_jax.checkpoint.tensors import TensorInfo, check_finite
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FREQS = "rope_freqs.weight"


class GGUFSource:
    """A GGUF file as a TensorSource under Hugging Face's Llama names, float32, one tensor at a time.

    hf_config: the config.json that belongs to it.
    Raises AtomError for other architectures and for whatever GGUFFile refuses.
    """

    def __init__(self, path: str | Path):
        self._file = GGUFFile(path)
        self.label = str(path)
        arch = self._file.metadata.get("general.architecture")
        if arch != "llama":
            raise AtomError(f"{path}: GGUF architecture {arch!r} is not supported (llama is)")
        self.hf_config = _hf_config(self._file)
        self._tokenizer_files = tokenizer_files(self._file.metadata, self.label)
        self._names = self._hf_names()
        float32 = np.dtype(np.float32)
        self.infos = {hf: TensorInfo(self._file.shapes[name], float32) for hf, name in self._names.items()}

    def _hf_names(self) -> dict[str, str]:
        names = dict(_TOP)
        for i in range(self.hf_config["num_hidden_layers"]):
            for hf, name in _LAYER.items():
                names[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{name}.weight"
        names = {hf: name for hf, name in names.items() if name in self._file.shapes}
        unknown = sorted(self._file.shapes.keys() - set(names.values()) - {_ROPE_FREQS})
        if unknown:
            raise AtomError(f"{self.label}: unknown tensors for a Llama model: {', '.join(unknown[:3])}")
        return names

    def read(self, name: str) -> np.ndarray:
        """One dequantized tensor, f32 [out, in] (norms: [d]), with the rotary rows in Hugging Face's order."""
        x = check_finite(self._file.tensor(self._names[name]), self.label, self._names[name])
        if name.endswith("q_proj.weight"):
            return _unpermute(x, self.hf_config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _unpermute(x, self.hf_config["num_key_value_heads"])
        return x

    def described(self) -> tuple[TransformerConfig, JsonTokenizer]:
        """(configuration, tokenizer with its chat template) of the model in the file."""
        cfg = registry.recognise(self.hf_config, self.label).from_hf(self.hf_config, self.label)
        return cfg, JsonTokenizer.from_files(self._tokenizer_files, self.label)

    def stored(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name in the file, shape, storage type such as "Q4_1", bytes) of every tensor."""
        return self._file.stored()


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    # llama.cpp rotates neighbouring rows (0,1), (2,3), ..; Hugging Face rotates row i with row i + half.
    rows, width = w.shape
    return w.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    meta, label = file.metadata, str(file.path)

    def number(key: str, default: Any = None, kind: type = int) -> Any:
        value = meta.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise AtomError(f"{label}: llama.{key} is {value!r} where a positive number is needed")
        # Stored as float32: the shortest decimal that means the same is what the original config said.
        return float(str(np.float32(value))) if kind is float else int(value)

    if meta.get("llama.expert_count", 0):
        raise AtomError(f"{label}: mixture-of-experts models (llama.expert_count) are not supported")
    if "token_embd.weight" not in file.shapes or len(file.shapes["token_embd.weight"]) != 2:
        raise AtomError(f"{label}: no token_embd.weight matrix")
    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads)
    if number("rope.dimension_count", head_dim) != head_dim or number("attention.value_length", head_dim) != head_dim:
        raise AtomError(f"{label}: partial rotary embeddings or unequal key and value sizes are not supported")
    theta = number("rope.freq_base", 10000.0, float)
    context = number("context_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", None, float),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim, context),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": special_id(meta, "bos", label),
        "eos_token_id": special_id(meta, "eos", label),
        "pad_token_id": special_id(meta, "padding", label),
        "dtype": "float32",
    }


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int, context: int) -> dict[str, Any] | None:
    meta = file.metadata
    if _ROPE_FREQS in file.shapes:
        return _llama3_scaling(file, theta, head_dim)
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = meta.get("llama.rope.scaling.factor")
    if kind not in ("linear", "yarn") or not isinstance(factor, float):
        raise AtomError(f"{file.path}: rope scaling {kind!r} with factor {factor!r} is not supported")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.get("llama.rope.scaling.original_context_length", context)
    return scaling


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rope_scaling, recovered from the per-frequency divisors that GGUF stores in its place."""
    stored = file.tensor(_ROPE_FREQS).reshape(-1)
    low, high, original = 1.0, 4.0, 8192
    factor = float(stored.max())
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # 1 where the wave is short, `factor` where it is long, and 1/(a blend of 1 and 1/factor) between the two.
    blend = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - blend) / factor + blend)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise AtomError(f"{file.path}: {_ROPE_FREQS} does not follow Llama 3's rule; the rotary scaling is unknown")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
