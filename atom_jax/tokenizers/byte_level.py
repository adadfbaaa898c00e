"""Byte-level BPE tokenizers that are given as a vocabulary, its merges and the name of a splitting rule.

A rule that is guessed wrongly still round-trips text while it yields other ids than the model was trained on, so a
name without a known rule is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from atom_jax.typing import AtomError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The files of tokenizers that were saved before tokenizer.json, and what their classes are called.
VOCABULARY, MERGES = "vocab.json", "merges.txt"
_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_MODEL_TYPES = {"olmo2": "gpt-2", "olmo3": "gpt-2", "qwen3": "qwen2"}  # where no class is named


@contextlib.contextmanager
def complaint(what: str) -> Iterator[None]:
    """Turns what the tokenizers package raises into an AtomError: bare Exceptions, and panics of its Rust code, which
    are not even that."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise AtomError(f"{what} ({e})") from None


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


# Name of the rule, as GGUF has it -> (pre-tokenizer, NFC first, whole words bypass the merges)
RULES = {
    "gpt-2": (_byte_level, False, False),
    "smollm": (_single_digits, False, False),
    "llama-bpe": (lambda: _split(r"\p{N}{1,3}"), False, True),
    "qwen2": (lambda: _split(r"\p{N}"), True, False),
}


def tokenizer_json(
    vocab: dict[str, int],
    merges: Sequence[str],
    rule: str,
    added: Sequence[AddedToken],
    front: Sequence[str],
    where: str,
    whole_words: bool = False,
) -> str:
    """The text of tokenizer.json.

    merges: two entries with a space between each. added: entries that are looked for in texts. front: entries that
    stand before every text. where: for messages. whole_words: words that are entries bypass the merges, whatever the
    rule says. Raises AtomError where it is no tokenizer.
    """
    build, nfc, ignore_merges = RULES[rule]
    with complaint(f"{where}: the vocabulary and merges do not make a BPE tokenizer"):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words or ignore_merges))
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer, tokenizer.decoder = build(), decoders.ByteLevel()
        tokenizer.add_tokens(list(added))
        parsed = json.loads(tokenizer.to_str())
    if front:
        parsed["post_processor"] = _template(front, vocab)
    return json.dumps(parsed, indent=2, ensure_ascii=False)


def _template(front: Sequence[str], vocab: dict[str, int]) -> dict[str, Any]:
    def row(sequence: str, kind: int) -> list[dict[str, Any]]:
        special = [{"SpecialToken": {"id": token, "type_id": kind}} for token in front]
        return [*special, {"Sequence": {"id": sequence, "type_id": kind}}]

    known = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in front}
    single, pair = row("A", 0), row("A", 0) + row("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def from_tables(vocab: dict[str, Any], merges: str, tables: dict[str, dict[str, Any]], where: str) -> str | None:
    """The text of tokenizer.json for a directory with vocab.json and merges.txt; None where nothing in it names a
    splitting rule that is known.

    tables: the directory's other JSON files. Raises AtomError for malformed ones.
    """
    config = tables.get("tokenizer_config.json", {})
    kind = config.get("tokenizer_class")
    if isinstance(kind, str):
        rule = _CLASSES.get(kind.removesuffix("Fast"))
    else:
        rule = _MODEL_TYPES.get(str(tables.get("config.json", {}).get("model_type")))
    if rule is None or config.get("add_prefix_space"):
        return None
    added = _added(tables, where)
    vocab = vocab | {token: i for token, (i, _) in added.items() if i is not None}
    if any(type(i) is not int or not 0 <= i < 2**31 for i in vocab.values()) or len({*vocab.values()}) < len(vocab):
        raise AtomError(f"{where}: {VOCABULARY} and the added tokens are not entries with a number of their own each")
    lines = merges.splitlines()
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    known = [AddedToken(token, **how) for token, (_, how) in added.items() if token in vocab]
    return tokenizer_json(vocab, [line for line in lines if line], rule, known, (), where)


def _added(tables: dict[str, dict[str, Any]], where: str) -> dict[str, tuple[int | None, dict[str, bool]]]:
    """Entries that are looked for in texts: their ids, where files say them, and options of AddedToken."""
    config, special = tables.get("tokenizer_config.json", {}), tables.get("special_tokens_map.json", {})
    out: dict[str, tuple[int | None, dict[str, bool]]] = {}
    for token, i in tables.get("added_tokens.json", {}).items():
        out[token] = (i, {"special": False, "normalized": False})
    for table in (special, config):
        for name, value in table.items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                out[token] = (out.get(token, (None,))[0], {"special": True, "normalized": False})
    decoder = config.get("added_tokens_decoder", {})
    for i, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not (str(i).isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise AtomError(f"{where}: added_tokens_decoder in tokenizer_config.json is not a table of tokens by id")
        options = ("special", "normalized", "lstrip", "rstrip", "single_word")
        out[entry["content"]] = (int(i), {name: entry.get(name) is True for name in options})
    return out
