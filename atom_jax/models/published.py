"""How a family is published: its config.json, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from atom_jax import tokenizers
from atom_jax.naming import Rule
from atom_jax.tokenizers import json_tokenizer
from atom_jax.typing import AtomError

# Fields of config.json that don't change what a model computes.
HARMLESS = {
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


def refuse_unknown(data: dict[str, Any], known: Collection[str], where: str) -> None:
    """Raises AtomError for fields that are neither `known` nor HARMLESS."""
    # Names that begin so are notes of programs to themselves.
    unknown = sorted(name for name in data.keys() - HARMLESS - set(known) if not name.startswith("_"))
    if unknown:
        advice = "remove what does not change what the model computes"
        raise AtomError(f"{where}: unknown fields: {', '.join(unknown)}; {advice}")


def own_tokenizer(cfg: Any, data: dict[str, Any], path: Path, find: Callable[[str], Path]) -> Any:
    """That of a directory with the config.json `data`: bytes where "atom_tokenizer" says so, or a tokenizer.json, or
    None. find: not used."""
    if (name := data.get("atom_tokenizer")) is None:
        return json_tokenizer.in_directory(path)
    return named_tokenizer(name, ("bytes",), path)


def named_tokenizer(name: Any, known: Sequence[str], path: Path) -> Any:
    """The tokenizer that the field "atom_tokenizer" of the config.json in a directory names; AtomError for unknown
    ones."""
    if name not in known:
        names = " and ".join(map(repr, known))
        raise AtomError(f"{path / 'config.json'}: atom_tokenizer is {str(name)[:60]!r}; known: {names}")
    return tokenizers.from_name(name)


def token_ids(cfg: Any) -> dict[str, Any]:
    """bos, eos and pad as config.json and generation_config.json spell them."""
    eos = cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos, "pad_token_id": cfg.pad_id}


@dataclasses.dataclass(frozen=True)
class Published:
    """How models of a family are published.

    recognises(data): whether the fields of a config.json are one's.
    from_hf(data, where) -> configuration; `where` names the file in messages. Raises AtomError, naming the field, for
        missing or senseless values, and for options that would change the mathematics and are not supported.
    to_hf(cfg, dtype) -> fields of config.json, for weights of `dtype`; AtomError where there is no such option.
    rules(cfg): published names of all tensors.
    token_ids(cfg): the fields of generation_config.json.
    tokenizer(cfg, data, path, find): of a directory with these fields, or None; `find` turns a published name into a
        local directory.
    """

    recognises: Callable[[dict[str, Any]], bool]
    from_hf: Callable[[dict[str, Any], str], Any]
    to_hf: Callable[[Any, str], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    token_ids: Callable[[Any], dict[str, Any]] = token_ids
    tokenizer: Callable[[Any, dict[str, Any], Path, Callable[[str], Path]], Any] = own_tokenizer
