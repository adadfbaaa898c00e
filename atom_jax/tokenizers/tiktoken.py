"""tiktoken files: one token a line, in base64, and its rank.

They hold no splitting rule and no special tokens. Both are known for the published files, which their sizes tell
apart; other files are refused, since a rule that is guessed wrongly yields ids that no model was trained on.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path

from tokenizers import AddedToken

from atom_jax.files import read_regular
from atom_jax.tokenizers.byte_level import tokenizer_json
from atom_jax.tokenizers.json_tokenizer import MAIN, JsonTokenizer, byte_of_character
from atom_jax.typing import AtomError

_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
# Tokens in the file -> (splitting rule, special tokens and their ids, bos, eos).
_KNOWN = {
    50256: ("gpt-2", {"<|endoftext|>": 50256}, None, "<|endoftext|>"),
    100256: (
        "llama-bpe",
        {"<|endoftext|>": 100257, **{t: 100258 + i for i, t in enumerate(_FIM)}, "<|endofprompt|>": 100276},
        None, "<|endoftext|>",
    ),
    128000: ("llama-bpe", {t: 128000 + i for i, t in enumerate(_LLAMA)}, "<|begin_of_text|>", "<|end_of_text|>"),
    151643: (
        "qwen2", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}, None, "<|endoftext|>",
    ),
}  # fmt: skip


def read(path: str | os.PathLike) -> JsonTokenizer:
    """The tokenizer of a tiktoken file of GPT-2, GPT-4 (cl100k), Llama 3 or Qwen.

    Raises AtomError for a file that is malformed or of another vocabulary.
    """
    ranks = _ranks(path)
    if len(ranks) not in _KNOWN:
        sizes = ", ".join(map(str, _KNOWN))
        raise AtomError(f"{path}: {len(ranks)} tokens; how texts are split is known for files of {sizes}")
    rule, special, bos, eos = _KNOWN[len(ranks)]
    names = {b: c for c, b in byte_of_character().items()}
    spelled = {token: "".join(names[b] for b in token) for token in ranks}
    merges = [f"{spelled[a]} {spelled[b]}" for token in ranks for a, b in _splits(token, ranks)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    front = [bos] if bos else []
    main = tokenizer_json(vocab, merges, rule, added, front, str(path), whole_words=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | ({"bos_token": bos} if bos else {})
    files = {MAIN: main, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    return JsonTokenizer.from_files(files, str(path))


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make this one: the encoder merges any of them at the rank of what they make."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    found = [(a, b) for a, b in pairs if a in ranks and b in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Token -> rank, by rank."""
    try:
        lines = read_regular(Path(path)).split(b"\n")
    except OSError as e:
        raise AtomError(f"{path}: cannot be read ({e.strerror})") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise AtomError(f"{path}: line {number} is not a token in base64 and its rank") from None
    ordered = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(len(ordered))) or any(bytes([b]) not in ordered for b in range(256)):
        raise AtomError(f"{path}: ranks do not count from 0, or a byte has none")
    return ordered
