"""Published transformers: config.json <-> TransformerConfig, and the names of their tensors."""

from __future__ import annotations

import json
from typing import Any

from atom_jax.fields import Fields
from atom_jax.kvcache import policies
from atom_jax.models import lora
from atom_jax.models import transformer_rope as rope
from atom_jax.models.published import refuse_unknown, token_ids
from atom_jax.models.transformer import TransformerConfig
from atom_jax.models.transformer_variants import FAMILIES, FULL, SLIDING, Variant
from atom_jax.naming import Rule
from atom_jax.typing import AtomError

_LAYER_NAMES = {FULL: "full", SLIDING: "sliding"}
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


def from_hf(data: dict[str, Any], where: str) -> TransformerConfig:
    """See `Published`; `model_type` is one of FAMILIES. AtomError for fields that are unknown altogether."""
    family, fields = data["model_type"], Fields(data, where)
    variant = FAMILIES[family]
    for name, value in _FIXED.items():
        if data.get(name, value) not in (value, None):
            raise AtomError(f"{where}: {name} is {str(data[name])[:60]}; only {json.dumps(value)} is supported")
    refuse_unknown(data, _OBEYED | _FIXED.keys() | policies.known_fields(), where)
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    layers = fields.size("num_hidden_layers", most=_MAX_LAYERS)
    vocab, length = fields.size("vocab_size"), fields.size("max_position_embeddings")
    layer_types, window = _sliding(fields, variant, layers)
    theta, scaling = rope.from_hf(fields, variant, length, "sliding" in layer_types)
    head_dim = fields.size("head_dim", variant.head_dim or max(width // heads, 1))
    if head_dim % 2:
        raise AtomError(f"{where}: head_dim {head_dim} is odd, rotary embeddings need pairs")
    memory = policies.from_hf(fields)
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
    """See `Published`; transformers 4.57 and 5 both read the fields as the same model. Policies that learn something
    are part of it, others only say how a model is run."""
    variant = FAMILIES[cfg.family]
    if "sliding" in cfg.layer_types and variant.kinds is None:
        raise AtomError(f"layer_types: published {cfg.family} models have no sliding layers, so this is not one")
    out = {
        "architectures": [variant.architecture],
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
        **rope.to_hf(cfg),
        **token_ids(cfg),
        "dtype": dtype,
    }
    if variant.kinds is not None:
        out |= {"layer_types": layer_types(cfg), "sliding_window": cfg.sliding_window}
    return out | variant.extra(cfg) | policies.to_hf(cfg.memory, cfg.family)


def layer_types(cfg: TransformerConfig) -> list[str]:
    """Published names of the layers' types."""
    theirs = {ours: name for name, ours in _LAYER_NAMES.items()}
    return [theirs[kind] for kind in cfg.layer_types or ("full",) * cfg.n_layers]


def _sliding(fields: Fields, variant: Variant, layers: int) -> tuple[tuple[str, ...], int | None]:
    """Layer types (empty when all are full) and the window in tokens, by the rules of the published code."""
    if variant.kinds is None:
        return (), None
    names = fields.data.get("layer_types")
    if names is None:
        names = variant.kinds(fields, layers)
    if not isinstance(names, list) or not all(isinstance(n, str) and n in _LAYER_NAMES for n in names):
        raise AtomError(f"{fields.where}: layer_types must be a list of {' and '.join(_LAYER_NAMES)}")
    if SLIDING not in names:
        return ((), None) if len(names) == layers else (tuple(_LAYER_NAMES[n] for n in names), None)
    if variant.switch is not None and not fields.flag(variant.switch, False):
        raise AtomError(f"{fields.where}: layer_types names sliding layers while {variant.switch} is false")
    return tuple(_LAYER_NAMES[n] for n in names), fields.size("sliding_window", 4096)


_MATRICES = (("self_attn", "attn", "qkv"), ("mlp", "mlp", ("gate", "up", "down")))
_LAYER = (
    *(Rule(f"{hf}.{n}_proj.weight", f"{ours}/{n}", 1) for hf, ours, names in _MATRICES for n in names),
    Rule("self_attn.o_proj.weight", "attn/o", 2),
)
# PEFT's names for what tuning adds.
_LORA = tuple(
    Rule(f"{hf}.{n}_proj.lora_{part.upper()}.weight", f"lora/{n}_{part}", lora.INPUTS[n] if part == "a" else 1)
    for hf, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for n in names
    for part in "ab"
)
_QK_NORM = tuple(Rule(f"self_attn.{n}_norm.weight", f"attn/{n}_norm") for n in "qk")


def rules(cfg: TransformerConfig) -> list[Rule]:
    """See `Published`."""
    return [
        Rule("model.embed_tokens.weight", "embed"),
        *(rule.inside("model.layers.{i}.", "layers/") for rule in layer_rules(cfg)),
        Rule("model.norm.weight", "norm"),
        Rule("lm_head.weight", "unembed", 1),
    ]


def layer_rules(cfg: TransformerConfig) -> list[Rule]:
    """Names within one layer."""
    variant = FAMILIES[cfg.family]
    # The same published name stands for different norms: before the MLP, or after attention.
    before, after = ("post_attention", "post_feedforward") if variant.post_norm else ("input", "post_attention")
    return [
        *_LAYER,
        *(_QK_NORM if variant.qk_norm != "none" else ()),
        Rule(f"{before}_layernorm.weight", "attn_norm"),
        Rule(f"{after}_layernorm.weight", "mlp_norm"),
        *(rule.inside("self_attn.", "attn/") for rule in policies.rules(cfg.memory)),
        *(_LORA if cfg.lora is not None else ()),
    ]
