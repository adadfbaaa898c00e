"""Tokenizers: bytes, bytes with word ends, and `tokenizer.json` files through the `tokenizers` package."""

from __future__ import annotations

import os

from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.bytes import ByteTokenizer, HNetByteTokenizer

__all__ = ["ByteTokenizer", "HNetByteTokenizer", "Tokenizer", "from_name"]


def from_name(name_or_path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer "bytes", "hat" or "hnet_bytes", or the one in a tokenizer.json file or in a directory.

    Raises AtomError when the file is missing or unreadable.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if str(name_or_path) == "hat":
        from atom_jax.tokenizers.hat import HatTokenizer  # imports the `regex` package

        return HatTokenizer()
    if str(name_or_path) == "hnet_bytes":
        return HNetByteTokenizer()
    from atom_jax.tokenizers.json_tokenizer import JsonTokenizer  # imports the `tokenizers` package

    return JsonTokenizer(name_or_path)
