"""Imports Llama-family GGUF files: as tensors under Hugging Face names, a config.json and tokenizer files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atom_jax.checkpoint import gguf_config, hf_config
from atom_jax.checkpoint.gguf_config import ROPE_FREQS
from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.checkpoint.gguf_tokenizer import tokenizer_files
from atom_jax.checkpoint.tensors import TensorInfo, check_finite
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
        self._tokenizer_files = tokenizer_files(self._file.metadata, self.label)
        self.hf_config = gguf_config.hf_config(self._file)
        self._names = self._hf_names()
        float32 = np.dtype(np.float32)
        self.infos = {hf: TensorInfo(self._file.shapes[name], float32) for hf, name in self._names.items()}

    def _hf_names(self) -> dict[str, str]:
        names = dict(_TOP)
        for i in range(self.hf_config["num_hidden_layers"]):
            for hf, name in _LAYER.items():
                names[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{name}.weight"
        names = {hf: name for hf, name in names.items() if name in self._file.shapes}
        unknown = sorted(self._file.shapes.keys() - set(names.values()) - {ROPE_FREQS})
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
        cfg = hf_config.from_hf(self.hf_config, self.label)
        return cfg, JsonTokenizer.from_files(self._tokenizer_files, self.label)

    def stored(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name in the file, shape, storage type such as "Q4_1", bytes) of every tensor."""
        return self._file.stored()


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    # llama.cpp rotates neighbouring rows (0,1), (2,3), ..; Hugging Face rotates row i with row i + half.
    rows, width = w.shape
    return w.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
