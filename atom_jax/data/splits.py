"""Which text belongs to which split, for sources that don't say so themselves.

From 20 documents on, whole documents: every block of 20 consecutive ones holds 18 of train, one of validation
and one of test, at places drawn from a hash of the block's number; those after the last whole block are
train. This takes no memory and no look at the data, and appending documents moves none of the whole blocks.
With fewer documents, parts of each: the first 90 percent are train, the next 5 validation, the last 5 test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from atom_jax.data.corpus import Corpus, Spans, Subset
from atom_jax.data.pieces import cut
from atom_jax.typing import AtomError

BLOCK = 20
_RANGES = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}  # percent


def take_split(corpus: Corpus, split: str, whole: bool = False) -> Corpus:
    """Returns the part of `corpus` that is `split`: "train", "validation", "test" or "all". whole: documents cannot
    be shared, and AtomError is raised where there are too few."""
    if split == "all":
        return corpus
    if whole and len(corpus) < BLOCK:
        raise AtomError(
            f"{corpus.what} holds {len(corpus)} conversations, too few to keep some from training: from {BLOCK} on"
            " they are split; or put them into directories train and validation."
        )
    if len(corpus) >= BLOCK:
        return Subset(corpus, SplitIndices(len(corpus), split))
    spans = []
    for i in range(len(corpus)):
        size = len(corpus.read(i)) if corpus.sizes is None else int(corpus.sizes[i])
        start, stop = (_at(corpus, i, size, percent) for percent in _RANGES[split])
        if stop > start:
            spans.append((i, start, stop))
    return Spans(corpus, spans)


def _at(corpus: Corpus, i: int, size: int, percent: int) -> int:
    nominal = -(-size * percent // 100)  # rounded up: a document too short to share is train
    return nominal if percent in (0, 100) else nominal + cut(corpus.read(i, nominal, nominal + 256))


def name_split(name: str) -> str:
    """Returns the split of a named document (90 / 5 / 5 percent), the same on every machine."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % BLOCK
    return {0: "validation", 1: "test"}.get(bucket, "train")


class SplitIndices(Sequence):
    """The numbers of the documents of one split, in increasing order, computed when asked for."""

    def __init__(self, n: int, split: str):
        """n: number of documents, at least 20; split: "train", "validation" or "test"."""
        self.split = split
        self.blocks, self.rest = divmod(n, BLOCK)

    def __len__(self) -> int:
        if self.split == "train":
            return self.blocks * (BLOCK - 2) + self.rest
        return self.blocks

    def __getitem__(self, k: int) -> int:
        if not 0 <= k < len(self):
            raise IndexError(k)
        if self.split != "train":
            return k * BLOCK + self._places(k)[self.split]
        block, place = divmod(k, BLOCK - 2)
        if block >= self.blocks:
            return k + 2 * self.blocks
        for held_out in sorted(self._places(block).values()):
            place += place >= held_out
        return block * BLOCK + place

    @staticmethod
    def _places(block: int) -> dict[str, int]:
        digest = hashlib.sha256(b"split %d" % block).digest()
        validation = int.from_bytes(digest[:8], "little") % BLOCK
        step = 1 + int.from_bytes(digest[8:16], "little") % (BLOCK - 1)
        return {"validation": validation, "test": (validation + step) % BLOCK}
