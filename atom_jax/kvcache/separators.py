"""Ids that separate parts of a text, by what they spell (SepLLM: Chen et al., 2024)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.tokenizers import Tokenizer
from atom_jax.typing import AtomError

MARKS = {".", ",", "?", "!", ";", ":"}


def separators(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that are a mark, alone or after a space, or white space alone."""
    found = []
    for i in range(tokenizer.vocab_size):
        # Some vocabularies lose a space at the start of a text.
        once, twice = tokenizer.decode_bytes([i]), tokenizer.decode_bytes([i, i])
        text = twice[len(once) :].decode("utf-8", errors="replace")
        if text and (text.removeprefix(" ") in MARKS or text.isspace()):
            found.append(i)
    return tuple(found)


def are(ids_bt: Any, chosen: tuple[int, ...], name: str) -> jax.Array:
    """bool [b, t]: ids that are among those chosen. AtomError where there are no ids, or none were chosen."""
    if ids_bt is None:
        raise AtomError(f"memory {name}: this layer does not read tokens, so it can't know which separate")
    if not chosen:
        raise AtomError(f"memory {name}: separators are missing: ids, which with_memory finds in the tokenizer")
    return jnp.isin(ids_bt, jnp.array(chosen, jnp.int32))
