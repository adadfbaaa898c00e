"""The byte-level BPE tokenizer that a GGUF file describes, as the files of a Hugging Face directory.

GGUF keeps the vocabulary and the merges, but only a *name* for the rule that splits text before merging
(`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken

from atom_jax.tokenizers.byte_level import RULES, tokenizer_json
from atom_jax.typing import AtomError

_CONTROL, _USER_DEFINED = 3, 4
_WITH_BOS = ("llama-bpe",)  # where llama.cpp puts bos in front unless the file says otherwise
# Keys that are read here.
USED = {
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.chat_template",
}  # fmt: skip


def tokenizer_files(metadata: dict[str, Any], origin: str) -> dict[str, str]:
    """Texts of tokenizer.json and tokenizer_config.json for the tokenizer described by GGUF `metadata`.

    origin: the file's name, for messages. Raises AtomError for tokenizers other than byte-level BPE, for an unknown
    splitting rule, and for values of the wrong type.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise AtomError(f"{origin}: tokenizer.ggml.model {kind!r} is not supported (only 'gpt2', byte-level BPE, is)")
    if not isinstance(pre, str) or pre not in RULES:
        raise AtomError(f"{origin}: tokenizer.ggml.pre {pre!r} has no known splitting rule ( {', '.join(RULES)})")
    tokens, merges = (_listed(metadata, key, str, origin) for key in ("tokens", "merges"))
    types = _listed(metadata, "token_type", int, origin)
    if len(types) != len(tokens):
        raise AtomError(f"{origin}: {len(tokens)} tokens but {len(types)} token types")
    config = _tokenizer_config(metadata, tokens, pre in _WITH_BOS, origin)
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    front = [config["bos_token"]] if config["add_bos_token"] else []
    return {
        "tokenizer.json": tokenizer_json(vocab, merges, pre, added, front, origin),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def special_id(metadata: dict[str, Any], name: str, origin: str) -> int | None:
    """Token id of "bos", "eos", "padding" or "unknown" in GGUF `metadata`, or None where it has none."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    n_tokens = len(metadata["tokenizer.ggml.tokens"])
    if value is not None and not (type(value) is int and 0 <= value < n_tokens):
        raise AtomError(f"{origin}: tokenizer.ggml.{name}_token_id {value!r} is not one of the {n_tokens} tokens")
    return value


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str], with_bos: bool, origin: str) -> dict[str, Any]:
    # PreTrainedTokenizerFast takes tokenizer.json as it is; a named class such as GPT2Tokenizer would put its
    # own splitting rule in place of the one built here.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = special_id(metadata, theirs, origin)
        if index is not None:
            config[f"{ours}_token"] = tokens[index]
    for name, default in (("add_bos_token", with_bos and "bos_token" in config), ("add_eos_token", False)):
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not bool or (value and name.removeprefix("add_") not in config):
            raise AtomError(f"{origin}: tokenizer.ggml.{name} is {value!r}; it must be a bool, and the token known")
        config[name] = value
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise AtomError(f"{origin}: tokenizer.chat_template is not a text")
    return config if template is None else config | {"chat_template": template}


def _listed(metadata: dict[str, Any], key: str, kind: type, origin: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise AtomError(f"{origin}: tokenizer.ggml.{key} is missing from the GGUF header")
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise AtomError(f"{origin}: tokenizer.ggml.{key} is not a list of {'texts' if kind is str else 'numbers'}")
    return value
