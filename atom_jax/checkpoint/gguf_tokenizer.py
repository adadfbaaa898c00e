"""Rebuilds the byte-level BPE tokenizer that a GGUF file describes, as the files of a Hugging Face directory.

GGUF keeps the vocabulary and the merges, but only a *name* for the rule that splits text before merging
(`tokenizer.ggml.pre`). A rule that is guessed wrongly still round-trips text while it yields other ids than
the model was trained on, so a name without a known rule is refused.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from atom_jax.typing import AtomError

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = "|".join([_CONTRACTIONS, _WORDS, digits, _TAIL])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# tokenizer.ggml.pre -> (pre-tokenizer, NFC first, whole words bypass the merges)
_RULES = {
    "gpt-2": (_byte_level, False, False),
    "smollm": (_single_digits, False, False),
    "llama-bpe": (lambda: _split(r"\p{N}{1,3}"), False, True),
    "qwen2": (lambda: _split(r"\p{N}"), True, False),
}


def tokenizer_files(metadata: dict[str, Any], origin: str) -> dict[str, str]:
    """Texts of tokenizer.json and tokenizer_config.json for the tokenizer described by GGUF `metadata`.

    origin: the file's name, for messages. Raises AtomError for tokenizers other than byte-level BPE and for
    an unknown splitting rule.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise AtomError(f"{origin}: tokenizer.ggml.model {kind!r} is not supported (only 'gpt2', byte-level BPE, is)")
    if pre not in _RULES:
        raise AtomError(f"{origin}: tokenizer.ggml.pre {pre!r} has no known splitting rule ( {', '.join(_RULES)})")
    tokens, types, merges = (_listed(metadata, key, origin) for key in ("tokens", "token_type", "merges"))
    if len(types) != len(tokens):
        raise AtomError(f"{origin}: {len(tokens)} tokens but {len(types)} token types")
    build, nfc, ignore_merges = _RULES[pre]
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        vocab = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    except Exception as e:  # the tokenizers package raises bare Exceptions
        raise AtomError(f"{origin}: the vocabulary and merges do not make a BPE tokenizer ({e})") from None
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    config = _tokenizer_config(metadata, tokens, origin)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def special_id(metadata: dict[str, Any], name: str, origin: str) -> int | None:
    """Token id of "bos", "eos", "padding" or "unknown" in GGUF `metadata`, or None where it has none."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    n_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    if value is not None and not (isinstance(value, int) and 0 <= value < n_tokens):
        raise AtomError(f"{origin}: tokenizer.ggml.{name}_token_id {value!r} is not one of the {n_tokens} tokens")
    return value


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str], origin: str) -> dict[str, Any]:
    # PreTrainedTokenizerFast takes tokenizer.json as it is; a named class such as GPT2Tokenizer would put its
    # own splitting rule in place of the one built here.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = special_id(metadata, theirs, origin)
        if index is not None:
            config[f"{ours}_token"] = tokens[index]
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _listed(metadata: dict[str, Any], key: str, origin: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise AtomError(f"{origin}: tokenizer.ggml.{key} is missing from the GGUF header")
    return value
