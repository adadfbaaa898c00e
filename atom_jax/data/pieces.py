"""Cutting long documents into pieces that can be read, shuffled and tokenized on their own."""

from __future__ import annotations

import re

import numpy as np

from atom_jax.data.config import LEAST_PIECE
from atom_jax.data.corpus import Corpus

_WORD_END = re.compile(rb"\S(?=[ \n])")


class Pieces:
    """A random-access source of {"text": bytes, "first": bool, "last": bool}, each about `piece_bytes` long.

    `first` and `last` say whether the piece begins and ends its document. Pieces of a document joined give
    the document again. Where the corpus doesn't know its sizes, a piece is a whole document, with whatever `marked`
    says of it.
    """

    def __init__(self, corpus: Corpus, piece_bytes: int):
        self.corpus = corpus
        self.piece_bytes = max(LEAST_PIECE, piece_bytes)
        self.reach = min(256, self.piece_bytes // 4)
        if corpus.sizes is None:
            self.ends = None
        else:
            # Rounding, so that the last piece has half to one and a half times the length, never a few bytes.
            counts = np.maximum(1, (corpus.sizes + self.piece_bytes // 2) // self.piece_bytes)
            self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.corpus) if self.ends is None else int(self.ends[-1])

    def __getitem__(self, k: int) -> dict:
        if self.ends is None:
            marked = getattr(self.corpus, "marked", None)
            document = {"text": self.corpus.read(k)} if marked is None else marked(k)
            return document | {"first": True, "last": True}
        doc = int(np.searchsorted(self.ends, k, side="right"))
        begin = 0 if doc == 0 else int(self.ends[doc - 1])
        part, count = k - begin, int(self.ends[doc]) - begin
        first, last = part == 0, part == count - 1
        start = part * self.piece_bytes
        stop = int(self.corpus.sizes[doc]) if last else start + self.piece_bytes
        text = self.corpus.read(doc, start, stop if last else stop + self.reach)
        lo = 0 if first else cut(text[: self.reach])
        hi = len(text) if last else stop - start + cut(text[stop - start :])
        return {"text": text[lo:hi], "first": first, "last": last}

    def mean_bytes(self) -> float:
        """Returns the mean length of a piece, from at most 256 pieces spread evenly."""
        sample = np.unique(np.linspace(0, len(self) - 1, 256).astype(np.int64))
        return float(np.mean([len(self[int(k)]["text"]) for k in sample]))


def cut(text: bytes) -> int:
    """Returns where to cut `text`, the bytes that follow a nominal cut.

    That is before the first space or line end after a word, where subword tokenizers split anyhow, or else
    before the first byte that begins a character.
    """
    match = _WORD_END.search(text)
    if match:
        return match.end()
    for i, byte in enumerate(text[:4]):
        if byte & 0xC0 != 0x80:
            return i
    return len(text)
