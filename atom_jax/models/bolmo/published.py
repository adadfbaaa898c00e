"""Bolmo's published files: its config.json <-> BolmoConfig, and its tensor names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from atom_jax.fields import Fields
from atom_jax.kvcache import policies
from atom_jax.models import transformer_published, transformer_rope
from atom_jax.models.bolmo.config import FUSED, BolmoConfig
from atom_jax.models.published import Published
from atom_jax.models.transformer_variants import FAMILIES
from atom_jax.naming import Rule
from atom_jax.tokenizers import BolmoTokenizer
from atom_jax.tokenizers.json_tokenizer import MAIN, JsonTokenizer
from atom_jax.typing import AtomError

# Fields of the model as a whole. All others are those of the layers over patches, which mean what they mean in a
# transformer's config.json.
_OWN = {
    "model_type", "vocab_size", "subword_vocab_size", "add_expanded_embeddings", "num_local_encoder_layers",
    "num_local_decoder_layers", "num_local_heads", "local_intermediate_size", "local_rms_norm_eps", "block_type",
    "use_qk_norm", "use_head_qk_norm", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_config",
    "boundary_threshold", "boundary_predictor_lookahead", "tie_word_embeddings",
}  # fmt: skip
# Other values of these mean a model that is not computed here.
_FIXED = {"boundary_threshold": "sample:0", "boundary_predictor_lookahead": 1, "tie_word_embeddings": False}
# (norms on the outputs, norms on all query and key heads at once, on each) -> our family of layers.
_BLOCKS = {
    ("reordered_norm", True, False): "olmo3",
    ("default", True, True): "qwen3",
    ("default", False, True): "qwen3",
    ("default", False, False): "llama",
}


def from_hf(data: dict[str, Any], where: str) -> BolmoConfig:
    """See `Published`. Layers over patches are OLMo's unless `block_type`, `use_qk_norm` and `use_head_qk_norm` say
    otherwise, as they do in files of later releases, of which none could be tried."""
    fields = Fields(data, where)
    for name, value in _FIXED.items():
        if data.get(name, value) not in (value, None):
            raise AtomError(f"{where}: {name} is {str(data[name])[:60]}; only {value!r} is supported")
    if data.get("rope_theta") is None and data.get("rope_parameters") is None:
        logging.warning("%s: rope_theta is missing; 10000 is used, though the models it came from had 500000", where)
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 65536}
    given = {name: value for name, value in data.items() if name not in _OWN and value is not None}
    vocab = fields.size("vocab_size", 2 * FUSED)
    family = _family(fields)
    # Which layers slide is in layer_types alone.
    switch = {name: "layer_types" in given for name in [FAMILIES[family].switch] if name is not None}
    main = transformer_published.from_hf(
        {**defaults, **given, **switch, "model_type": family, "vocab_size": vocab}, where
    )
    eos = fields.ids("eos_token_id", FUSED)
    original = fields.table("tokenizer_config").data.get("original_identifier", BolmoConfig.subword_tokenizer)
    if not isinstance(original, str):
        raise AtomError(f"{where}: original_identifier is {str(original)[:60]}; it must be a name")
    try:
        return BolmoConfig(
            main=main,
            vocab_size=vocab,
            subwords=fields.size("subword_vocab_size", 100278) if fields.flag("add_expanded_embeddings", True) else 0,
            encoder_layers=fields.size("num_local_encoder_layers", 1),
            decoder_layers=fields.size("num_local_decoder_layers", 4),
            local_heads=fields.size("num_local_heads", 16),
            local_d_ff=fields.size("local_intermediate_size", 5504),
            edge_eps=fields.number("local_rms_norm_eps", 1e-5),
            max_length=main.max_length,
            bos_id=next(iter(fields.ids("bos_token_id", FUSED)), None),
            eos_ids=(*eos, *(i + FUSED for i in eos)),
            pad_id=next(iter(fields.ids("pad_token_id", FUSED)), None),
            subword_tokenizer=original,
            dtype=main.dtype,
        )
    except AtomError as e:
        raise AtomError(e if str(e).startswith(where) else f"{where}: {e}") from None


def _family(fields: Fields) -> str:
    """The family of layers over patches."""
    kind = fields.data.get("block_type", "reordered_norm")
    head = fields.flag("use_head_qk_norm", False)
    norm = fields.flag("use_qk_norm", kind == "reordered_norm")
    if (kind, norm, head) not in _BLOCKS:
        raise AtomError(
            f"{fields.where}: block_type {str(kind)[:60]!r} with use_qk_norm {norm} and use_head_qk_norm {head} is"
            " not supported"
        )
    return _BLOCKS[kind, norm, head]


def to_hf(cfg: BolmoConfig, dtype: str) -> dict[str, Any]:
    """See `Published`. What only says how a model is run or trained is left out."""
    main, family = cfg.main, FAMILIES[cfg.main.family]
    out = {
        "architectures": ["BolmoForCausalLM"],
        "model_type": "bolmo",
        "vocab_size": cfg.vocab_size,
        "subword_vocab_size": cfg.subwords or 100278,
        "add_expanded_embeddings": bool(cfg.subwords),
        "hidden_size": main.d_model,
        "intermediate_size": main.d_ff,
        "num_hidden_layers": main.n_layers,
        "num_attention_heads": main.n_heads,
        "num_key_value_heads": main.n_kv_heads,
        "head_dim": main.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_types": transformer_published.layer_types(main),
        "sliding_window": main.sliding_window,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": main.norm_eps,
        "num_local_encoder_layers": cfg.encoder_layers,
        "num_local_decoder_layers": cfg.decoder_layers,
        "num_local_heads": cfg.local_heads,
        "local_intermediate_size": cfg.local_d_ff,
        "local_rms_norm_eps": cfg.edge_eps,
        **_FIXED,
        **{name: value for name, value in transformer_rope.to_hf(main).items() if name != "rope_parameters"},
        **token_ids(cfg),
        "tokenizer_config": {
            "vocab_size": cfg.vocab_size,
            "bos_token_id": BolmoTokenizer.bos_id,
            "pad_token_id": BolmoTokenizer.pad_id,
            "eos_token_id": BolmoTokenizer.eos_ids[0],
            "bpe_token_end_id": 3,
            "special_tokens": ["<pad>", "<bos>", "<eos>", "<bpe_token_end>"],
            "special_tokens_first": True,
            "original_identifier": cfg.subword_tokenizer,
        },
        "dtype": dtype,
    }
    out |= policies.to_hf(main.memory, cfg.family)
    if family.post_norm:
        return out
    head = family.qk_norm == "head"
    return out | {"block_type": "default", "use_qk_norm": head, "use_head_qk_norm": head}


def token_ids(cfg: BolmoConfig) -> dict[str, Any]:
    """See `Published`: without forms at the ends of patches."""
    eos = [i for i in cfg.eos_ids if i < FUSED]
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": cfg.pad_id}  # fmt: skip


def tokenizer(cfg: BolmoConfig, data: dict[str, Any], path: Path, find: Callable[[str], Path]) -> BolmoTokenizer:
    """See `Published`. Subwords are in the directory itself, or in one there that has their tokenizer's name, or else
    published under that name."""
    places = (path, path / cfg.subword_tokenizer)
    place = next((place for place in places if os.path.isfile(place / MAIN)), None)
    if place is None and cfg.subwords:
        try:
            place = find(cfg.subword_tokenizer)
        except AtomError as e:
            logging.warning("%s: no subword tokenizer, without which this model can only be converted: %s", path, e)
    return BolmoTokenizer(None if place is None else JsonTokenizer(place))


_LOCAL = (
    Rule("pre_xlstm_layernorm.weight", "norm1"),
    *(Rule(f"xlstm.{name}.weight", f"mixer/{name}", 1) for name in "qkv"),
    Rule("xlstm.ogate_preact.weight", "mixer/gate", 1),
    Rule("xlstm.igate_preact.weight", "mixer/input/w", 1),
    Rule("xlstm.igate_preact.bias", "mixer/input/b"),
    Rule("xlstm.fgate_preact.weight", "mixer/forget/w", 1),
    Rule("xlstm.fgate_preact.bias", "mixer/forget/b"),
    Rule("xlstm.multihead_norm.weight", "mixer/norm"),
    Rule("xlstm.out_proj.weight", "mixer/o", 2),
    Rule("pre_feedforward_layernorm.weight", "norm2"),
    *(Rule(f"mlp.{name}_proj.weight", f"mlp/{name}", 1) for name in ("gate", "up", "down")),
)


def rules(cfg: BolmoConfig) -> list[Rule]:
    """See `Published`."""
    encoder, decoder = "model.local_encoder.", "model.local_decoder."
    out = [
        Rule(f"{encoder}byte_embedding.weight", "embed"),
        Rule(f"{encoder}subword_embedding.weight", "subwords"),
        Rule(f"{encoder}post_last_block_norm.weight", "encoder_norm"),
        Rule(f"{encoder}out_projection.weight", "pool/w", 1),
        Rule(f"{encoder}out_projection.bias", "pool/b"),
        *(Rule(f"{encoder}boundary_predictor_module.{n}_proj_layer.weight", f"rule/{n}", 1) for n in "qk"),
        Rule(f"{decoder}initial_norm.weight", "patch_norm"),
        Rule(f"{decoder}in_projection.weight", "residual/w", 1),
        Rule(f"{decoder}in_projection.bias", "residual/b"),
        Rule("model.norm.weight", "norm"),
        Rule("lm_head.weight", "unembed", 1),
    ]
    for hf, ours, layer in (
        (encoder, "encoder/", _LOCAL),
        (decoder, "decoder/", _LOCAL),
        ("model.", "main/", transformer_published.layer_rules(cfg.main)),
    ):
        out += [rule.inside(f"{hf}layers.{{i}}.", ours) for rule in layer]
    return out


PUBLISHED = Published(
    recognises=lambda data: data.get("model_type") == "bolmo",
    from_hf=from_hf,
    to_hf=to_hf,
    rules=rules,
    token_ids=token_ids,
    tokenizer=tokenizer,
)
