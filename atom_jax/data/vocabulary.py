"""The text that tokenizers are trained on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from atom_jax.data.pieces import Pieces, cut
from atom_jax.data.sources import open_source
from atom_jax.tokenizers.base import Tokenizer

# Bytes to train on. A unigram model takes two minutes for its share in seven languages (7 s for six novels).
LIMITS = {"bpe": 1 << 26, "unigram": 1 << 22, "words": 1 << 20}
_READ = 1 << 20
_PART = 1 << 12  # training takes the square of the length of text without spaces


def training_text(sources: Sequence[str], limit: int = LIMITS["bpe"]) -> Iterator[bytes]:
    """Yields the first `limit` bytes of the sources' train splits, an equal share of each, in parts of some KB."""
    for source in sources:
        left = limit // len(sources)
        pieces = Pieces(open_source(source, "train"), _READ)
        for k in range(len(pieces)):
            text = pieces[k]["text"]
            if len(text) > left:
                text = text[: left + cut(text[left : left + 256])]
            left -= len(text)
            yield from _parts(text)
            if left <= 0:
                break


@functools.lru_cache(maxsize=2)
def trained_tokenizer(name: str, sources: tuple[str, ...]) -> Tokenizer:
    """The tokenizer "bpe:SIZE", "unigram:SIZE" or "words:SIZE" of the sources' train splits (tokenizers/train.py)."""
    from atom_jax.tokenizers.train import train  # imports the `tokenizers` package

    return train(name, training_text(sources, LIMITS[name.partition(":")[0]]))


def _parts(text: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        nominal = start + _PART
        stop = nominal + cut(text[nominal : nominal + 256]) if nominal < len(text) else len(text)
        yield text[start:stop]
        start = stop
