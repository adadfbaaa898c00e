"""config.json of Hugging Face <-> TransformerConfig."""

from __future__ import annotations

import json
from typing import Any

from atom_jax.checkpoint import hf_dms, hf_rope
from atom_jax.checkpoint.fields import Fields
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import AtomError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
_WITH_SLIDING = ("qwen3", "olmo3")
_LAYER_NAMES = {"full_attention": "full", "sliding_attention": "sliding"}
_MAX_LAYERS = 10_000  # bounds what a lying config.json can make us build
# Other values of these fields mean a model that is not computed here.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "clip_qkv": None,
    "quantization_config": None,
    "pruned_heads": {},
    "use_mrope": False,
}
_OBEYED = {
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "atom_tokenizer",
}  # fmt: skip
_HARMLESS = {
    "architectures", "_name_or_path", "transformers_version", "use_cache", "initializer_range", "attention_dropout",
    "hidden_dropout", "pretraining_tp", "_attn_implementation", "_attn_implementation_autoset", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_llama_config", "unsloth_fixed", "unsloth_version", "transformers.js_config",
    "unk_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "task_specific_params",
    "problem_type", "id2label", "label2id", "license", "finetuning_task", "torchscript", "prefix", "name_or_path",
    "num_labels", "use_bfloat16", "tf_legacy_loss", "cross_attention_hidden_size", "tie_encoder_decoder",
    "keys_to_ignore_at_inference", "attn_implementation", "auto_map", "model_max_length",
    # How texts are drawn by default, which transformers used to keep here.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "begin_suppress_tokens",
}  # fmt: skip


def from_hf(data: dict[str, Any], where: str) -> TransformerConfig:
    """TransformerConfig of the fields of a config.json; `where` names the file in messages.

    Raises AtomError, naming the field, for an unknown model_type, a missing or senseless value, or an option that
    would change the mathematics and is not supported, or is not known at all and might.
    """
    family = data.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise AtomError(f"{where}: model_type {family!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    fields = Fields(data, where)
    for name, value in _FIXED.items():
        if data.get(name, value) not in (value, None):
            raise AtomError(f"{where}: {name} is {str(data[name])[:60]}; only {json.dumps(value)} is supported")
    unknown = sorted(data.keys() - _OBEYED - _HARMLESS - _FIXED.keys() - hf_dms.OBEYED - hf_dms.HARMLESS)
    unknown = [name for name in unknown if not name.startswith("_")]  # notes of programs to themselves
    if unknown:
        advice = "remove what does not change what the model computes"
        raise AtomError(f"{where}: unknown fields: {', '.join(unknown)}; {advice}")
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    layers = fields.size("num_hidden_layers", most=_MAX_LAYERS)
    vocab, length = fields.size("vocab_size"), fields.size("max_position_embeddings")
    layer_types, window = _sliding(fields, family, layers)
    theta, scaling = hf_rope.from_hf(fields, family, length, "sliding" in layer_types)
    # Qwen3's published code has a fixed default, the others divide.
    head_dim = fields.size("head_dim", 128 if family == "qwen3" else max(width // heads, 1))
    if head_dim % 2:
        raise AtomError(f"{where}: head_dim {head_dim} is odd, rotary embeddings need pairs")
    memory = hf_dms.from_hf(fields)
    stored = data.get("dtype") or data.get("torch_dtype")
    try:
        return TransformerConfig(
            family=family,
            vocab_size=vocab,
            d_model=width,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=fields.size("num_key_value_heads", heads),
            head_dim=head_dim,
            d_ff=fields.size("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            layer_types=layer_types,
            max_length=length,
            bos_id=next(iter(fields.ids("bos_token_id", vocab)), None),
            eos_ids=fields.ids("eos_token_id", vocab),
            pad_id=next(iter(fields.ids("pad_token_id", vocab)), None),
            dtype="bfloat16" if stored == "bfloat16" else "float32",
            memory=memory,
            **({"sliding_window": window} if window else {}),
        )
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None


def to_hf(cfg: TransformerConfig, dtype: str) -> dict[str, Any]:
    """config.json for `cfg` with weights of `dtype`, which transformers 4.57 and 5 both read as the same model.

    Learned evictors are part of it, other cache policies are not: they only say how a model is run.
    Raises AtomError where the published family has no such option.
    """
    sliding = "sliding" in cfg.layer_types
    if sliding and cfg.family not in _WITH_SLIDING:
        raise AtomError(f"layer_types: published {cfg.family} models have no sliding layers, so this is not one")
    out = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "attention_bias": False,
        "tie_word_embeddings": cfg.tie_embeddings,
        **hf_rope.to_hf(cfg),
        **token_ids(cfg),
        "dtype": dtype,
    }
    if cfg.family in _WITH_SLIDING:
        theirs = {ours: name for name, ours in _LAYER_NAMES.items()}
        out["layer_types"] = [theirs[kind] for kind in cfg.layer_types or ("full",) * cfg.n_layers]
        out["sliding_window"] = cfg.sliding_window if sliding or cfg.family == "olmo3" else None
    if cfg.family == "qwen3":
        out["use_sliding_window"] = sliding
        out["max_window_layers"] = cfg.layer_types.index("sliding") if sliding else cfg.n_layers
    return out if cfg.dms is None else out | hf_dms.to_hf(cfg.family, cfg.dms)


def token_ids(cfg: TransformerConfig) -> dict[str, Any]:
    """bos, eos and pad as config.json and generation_config.json spell them."""
    eos = cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos, "pad_token_id": cfg.pad_id}


def _sliding(fields: Fields, family: str, layers: int) -> tuple[tuple[str, ...], int | None]:
    """Layer types (empty when all are full) and the window in tokens, by the rules of the published code."""
    data = fields.data
    if family not in _WITH_SLIDING:
        return (), None
    names = data.get("layer_types")
    switched_on = family == "olmo3" or fields.flag("use_sliding_window", False)
    if names is None and family == "olmo3":
        names = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
    elif names is None:
        first = fields.size("max_window_layers", 28, least=0) if switched_on else layers
        names = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if not isinstance(names, list) or not all(isinstance(n, str) and n in _LAYER_NAMES for n in names):
        raise AtomError(f"{fields.where}: layer_types must be a list of {' and '.join(_LAYER_NAMES)}")
    if "sliding_attention" not in names:
        return ((), None) if len(names) == layers else (tuple(_LAYER_NAMES[n] for n in names), None)
    if not switched_on:
        raise AtomError(f"{fields.where}: layer_types names sliding layers while use_sliding_window is false")
    return tuple(_LAYER_NAMES[n] for n in names), fields.size("sliding_window", 4096)
