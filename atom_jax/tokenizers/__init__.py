"""Tokenizers: bytes, bytes with word ends, and `tokenizer.json` files through the `tokenizers` package."""

from __future__ import annotations

import os
import re

from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.tokenizers.bytes import ByteTokenizer, HNetByteTokenizer, PixelTokenizer
from atom_jax.typing import AtomError

__all__ = [
    "BolmoTokenizer", "ByteTokenizer", "HNetByteTokenizer", "PixelTokenizer", "Tokenizer", "from_name", "is_trained",
    "padded",
]  # fmt: skip

# One entry per byte, and bos, eos, pad.
_LEAST = 259


def from_name(name_or_path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer "bytes", "pixels", "hat", "hnet_bytes" or "bolmo" ("bolmo:PATH": with the subwords of the
    tokenizer there), or the one in a tokenizer.json or .tiktoken file or in a directory.

    Raises AtomError when the file is missing or unreadable.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if str(name_or_path) == "pixels":
        return PixelTokenizer()
    if str(name_or_path) == "hat":
        from atom_jax.tokenizers.hat import HatTokenizer  # imports the `regex` package

        return HatTokenizer()
    if str(name_or_path) == "hnet_bytes":
        return HNetByteTokenizer()
    if str(name_or_path) == "bolmo":
        return BolmoTokenizer()
    from atom_jax.tokenizers.json_tokenizer import JsonTokenizer  # imports the `tokenizers` package

    if str(name_or_path).startswith("bolmo:"):
        return BolmoTokenizer(JsonTokenizer(str(name_or_path).removeprefix("bolmo:")))
    if str(name_or_path).endswith(".tiktoken"):
        from atom_jax.tokenizers import tiktoken  # imports the `tokenizers` package

        return tiktoken.read(name_or_path)
    return JsonTokenizer(name_or_path)


def padded(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer for a model whose table has so many rows: those beyond the vocabulary, which can be drawn, stand
    for no text."""
    return tokenizer.padded(rows) if hasattr(tokenizer, "padded") else tokenizer


def same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether all ids that both have stand for the same text."""
    return all(one.decode([i]) == other.decode([i]) for i in range(min(one.vocab_size, other.vocab_size)))


def is_trained(name: str) -> bool:
    """Whether `name` asks for a tokenizer that a run trains on its own text: "bpe:SIZE", "unigram:SIZE" or
    "words:SIZE".

    Raises AtomError for such a name with too few entries: less than one per byte and three special ones, or, of
    words, than four special ones and one word.
    """
    match = re.fullmatch(r"(bpe|unigram|words):(\d+)", name)
    if match and int(match[2]) < (least := 5 if match[1] == "words" else _LEAST):
        raise AtomError(f"{name}: a trained vocabulary must have at least {least} entries")
    return bool(match)
