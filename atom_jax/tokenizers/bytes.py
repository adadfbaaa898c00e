"""Tokenizers without a vocabulary: one token per byte of UTF-8, and a few special ids."""

from __future__ import annotations

import numpy as np

from atom_jax.typing import AtomError


class ByteTokenizer:
    """Byte b is id b. Ids from 256 are special and stand for no bytes.

    The vocabulary is 264 rather than 259 so that embedding and output tables divide by 8 for sharding.
    """

    name = "bytes"
    vocab_size = 264
    bos_id = 256
    eos_ids = (257,)
    pad_id = 258

    @property
    def front(self) -> tuple[int, ...]:
        """Every text begins with bos, where there is one."""
        return () if self.bos_id is None else (self.bos_id,)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns i32 [n], the bytes of `text`; AtomError when a str holds a lone surrogate."""
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids) -> bytes:
        """Returns the bytes of `ids`, without the special ones; AtomError for ids outside [0, 264)."""
        ids = self._known(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def _known(self, ids) -> np.ndarray:
        """ids i64 [n]; AtomError for those outside the vocabulary."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise AtomError(f"Token id {wrong} is outside the byte vocabulary of {self.vocab_size}.")
        return ids

    def decode(self, ids) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spans(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids i32 [n], spans i32 [n, 2]); token i covers exactly byte i."""
        ids = self.encode(text)
        starts = np.arange(len(ids), dtype=np.int32)
        return ids, np.stack([starts, starts + 1], axis=1)

    def save(self, directory) -> None:
        """Writes nothing: the name "bytes" says it all."""


class HNetByteTokenizer(ByteTokenizer):
    """H-Net's bytes: 254 begins a document and 255 ends it, which no UTF-8 has; there are no other ids."""

    name = "hnet_bytes"
    vocab_size = 256
    bos_id = 254
    eos_ids = (255,)
    pad_id = 255

    def decode_bytes(self, ids) -> bytes:
        """Returns the bytes of `ids`, without the special ones; AtomError for ids outside [0, 256)."""
        data = np.frombuffer(super().decode_bytes(ids), np.uint8)
        return data[data < self.bos_id].tobytes()


class PixelTokenizer(ByteTokenizer):
    """The bytes of images, which nothing begins or ends."""

    name = "pixels"
    vocab_size = 256
    bos_id = None
    eos_ids = ()
    pad_id = 0


def to_utf8(text: str | bytes) -> bytes:
    """UTF-8 of a str, or the bytes as they are. Raises AtomError when a str holds a lone surrogate."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise AtomError(f"The text has a lone surrogate at character {e.start}, which UTF-8 cannot hold.") from None
