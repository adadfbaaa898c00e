"""Where units end that a tokenizer cuts a text into."""

from __future__ import annotations

import numpy as np

from atom_jax.tokenizers.base import Tokenizer

_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


def unit_ends(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
    """Returns bool [n], True at the last byte of every unit of a UTF-8 text of n bytes.

    Units are the tokenizer's pieces, as targets for a model that learns where units end (Nawrot et al. 2023, whose
    unigram targets these are). Spaces belong to the unit before them, and no unit ends inside a character. The last
    byte of the text is False: nobody knows whether its unit goes on.
    """
    data = np.frombuffer(text, np.uint8)
    n = len(data)
    before = np.zeros(n + 1, bool)  # a unit ends before byte i
    before[tokenizer.spans(text)[1][:, 1]] = True
    space = _SPACE[data]
    before[:n] &= ~space & (data & 0xC0 != 0x80)
    before[1:n] |= space[:-1] & ~space[1:]
    before[n:] = False
    return before[1:]
