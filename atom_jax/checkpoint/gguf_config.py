"""The config.json that belongs to a Llama-family GGUF file.

Every key of the namespaces llama, tokenizer and split is used, or known to change nothing; other ones are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.checkpoint.gguf_tokenizer import USED, special_id
from atom_jax.typing import AtomError

ROPE_FREQS = "rope_freqs.weight"
_MAX_LAYERS = 10_000  # bounds what a lying header can make us build
_USED = {
    "llama.context_length", "llama.embedding_length", "llama.block_count", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length",
    "llama.attention.value_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.dimension_count",
    "llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear",
    "llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.yarn_beta_fast", "llama.rope.scaling.yarn_beta_slow",
    "split.no", "split.count", "split.tensors.count",
}  # fmt: skip
# What only describes the file, and ids of tokens that are looked up by their name where they are wanted.
_HARMLESS = re.compile(
    r"llama\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned)"
    r"|tokenizer\.(ggml\.(scores|token_type_count|added_tokens|(seperator|mask|cls|fim_\w+|prefix|suffix|middle)_token_id)"
    r"|huggingface\.json|rwkv\.world|chat_templates|chat_template\..+)"
)
# Values that mean the same as leaving the key out; others mean a model or a tokenizer that is not computed here.
_NEUTRAL = {
    "llama.expert_count": 0, "llama.expert_used_count": 0, "llama.use_parallel_residual": False,
    "llama.attention.causal": True, "llama.attention.clamp_kqv": 0.0, "llama.attention.max_alibi_bias": 0.0,
    "llama.attention.sliding_window": 0, "llama.attention.scale": 0.0, "llama.logit_scale": 0.0,
    "llama.attn_logit_softcapping": 0.0, "llama.final_logit_softcapping": 0.0, "llama.residual_scale": 0.0,
    "llama.embedding_scale": 0.0, "llama.rope.scaling.alpha": 0.0, "llama.rope.scaling.yarn_ext_factor": 1.0,
    "llama.rope.scaling.yarn_attn_factor": 1.0, "llama.rope.scaling.yarn_log_multiplier": 0.0,
    "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
}  # fmt: skip


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json for the model in a GGUF file.

    Raises AtomError, naming the key, for what is missing, senseless or not supported.
    """
    meta, label = file.metadata, str(file.path)
    if meta.get("llama.expert_count", 0):
        raise AtomError(f"{label}: mixture-of-experts models (llama.expert_count) are not supported")
    _check_keys(meta, label)
    if "token_embd.weight" not in file.shapes or len(file.shapes["token_embd.weight"]) != 2:
        raise AtomError(f"{label}: no token_embd.weight matrix")
    heads, width = _size(file, "attention.head_count"), _size(file, "embedding_length")
    head_dim = _size(file, "attention.key_length", max(width // heads, 1))
    same = ("rope.dimension_count", "attention.value_length")
    if any(_size(file, key, head_dim) != head_dim for key in same):
        raise AtomError(f"{label}: partial rotary embeddings or unequal key and value sizes are not supported")
    theta, context = _number(file, "rope.freq_base", 10000.0), _size(file, "context_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _size(file, "block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim, context),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": special_id(meta, "bos", label),
        "eos_token_id": _eos(meta, label),
        "pad_token_id": special_id(meta, "padding", label),
        "dtype": "float32",
    }


def _check_keys(meta: dict[str, Any], label: str) -> None:
    for key, value in meta.items():
        ours = key.startswith(("llama.", "tokenizer.", "split.")) and key not in _USED | USED
        if ours and key in _NEUTRAL and type(value) in (bool, int, float):
            if value != _NEUTRAL[key]:
                raise AtomError(f"{label}: {key} is {value}; only {_NEUTRAL[key]} is supported")
        elif ours and not _HARMLESS.fullmatch(key):
            raise AtomError(f"{label}: {key} is not known, and may change what the model computes")
    if (kind := meta.get("general.type", "model")) != "model":
        raise AtomError(f"{label}: general.type is {kind!r}, not a model")


def _eos(meta: dict[str, Any], label: str) -> int | list[int] | None:
    """Every token that ends a text: also that of a turn (eot), and of a message (eom)."""
    found = [special_id(meta, name, label) for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(i for i in found if i is not None))
    return ids if len(ids) > 1 else next(iter(ids), None)


def _size(file: GGUFFile, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    value = file.metadata.get(f"llama.{key}", default)
    if type(value) is not int or not 1 <= value <= most:
        raise AtomError(f"{file.path}: llama.{key} is {value!r} where a positive number up to {most} is needed")
    return value


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(f"llama.{key}", default)
    if type(value) not in (int, float) or not 0 < value < 1e30 or not math.isfinite(value):
        raise AtomError(f"{file.path}: llama.{key} is {value!r} where a positive number is needed")
    # Stored as float32: the shortest decimal that means the same is what the original config said.
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int, context: int) -> dict[str, Any] | None:
    """By llama.cpp's rules: a factor without a type is linear, and attn_factor multiplies what YaRN does anyway."""
    meta = file.metadata
    kind, attention = meta.get("llama.rope.scaling.type", "linear"), _number(file, "rope.scaling.attn_factor", 1.0)
    key = "rope.scaling.factor" if "llama.rope.scaling.factor" in meta else "rope.scale_linear"
    factor = 1.0 if meta.get(f"llama.{key}", 0.0) == 0.0 else _number(file, key)
    if kind not in ("none", "linear", "yarn"):
        raise AtomError(f"{file.path}: llama.rope.scaling.type {kind!r} is not supported")
    if attention != 1.0 and kind != "yarn":
        raise AtomError(f"{file.path}: llama.rope.scaling.attn_factor is {attention}; only yarn may have one")
    stretched = kind != "none" and factor != 1.0
    if ROPE_FREQS in file.shapes:
        if stretched:
            raise AtomError(f"{file.path}: {ROPE_FREQS} together with a rope scaling factor is not supported")
        return _llama3_scaling(file, theta, head_dim)
    if kind == "yarn":
        original = _size(file, "rope.scaling.original_context_length", context)
        out = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
        out |= {name: _number(file, key) for name, key in betas.items() if f"llama.{key}" in meta}
        if attention != 1.0:
            out["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return out
    return {"rope_type": "linear", "factor": factor} if stretched else None


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rope_scaling, recovered from the per-frequency divisors that GGUF stores in its place."""
    stored = file.tensor(ROPE_FREQS).reshape(-1)
    low, high, original = 1.0, 4.0, 8192
    factor = float(stored.max())
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # 1 where the wave is short, `factor` where it is long, and 1/(a blend of 1 and 1/factor) between the two.
    blend = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - blend) / factor + blend)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise AtomError(f"{file.path}: {ROPE_FREQS} does not follow Llama 3's rule; the rotary scaling is unknown")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
