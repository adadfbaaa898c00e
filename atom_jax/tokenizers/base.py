"""What every tokenizer offers, whatever it is made of."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> token ids.

    name:       what `tokenizers.from_name` needs to find this tokenizer again ("bytes" or a path).
    vocab_size: ids are in [0, vocab_size).
    bos_id:     id that begins a document, or None.
    eos_ids:    ids that end a document; data uses the first. () when there is none.
    front:      ids that the tokenizer's makers put before every text (encode doesn't): mostly bos, or none.
    pad_id:     id that fills unused positions; it is always masked.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    front: tuple[int, ...]
    pad_id: int

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns i32 [n]; no bos or eos is added. `bytes` are UTF-8. Raises AtomError when they are not."""
        ...

    def decode(self, ids) -> str:
        """Returns the text of `ids` (any sequence of int); bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids) -> bytes:
        """Returns exactly the bytes that `ids` stand for."""
        ...

    def spans(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids i32 [n], spans i32 [n, 2]), the first and one past the last byte of each token."""
        ...

    def save(self, directory) -> None:
        """Writes what `from_name(directory)` needs; a tokenizer without files writes nothing."""
        ...


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Ids that stand before a document in training, so that its first token has something to be predicted from: the
    tokenizer's front, else bos, else eos; none where it has none of them."""
    ends = tokenizer.eos_ids[:1] if tokenizer.bos_id is None else (tokenizer.bos_id,)
    return list(getattr(tokenizer, "front", ()) or ends)
