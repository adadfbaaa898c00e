"""One finite pass over a split, in order, with every token scored exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from atom_jax.data.config import DataConfig
from atom_jax.data.corpus import Corpus
from atom_jax.data.packing import Batch, empty_batch, piece_ids, place
from atom_jax.data.pieces import Pieces
from atom_jax.data.sources import open_source
from atom_jax.tokenizers.base import Tokenizer
from atom_jax.typing import AtomError

_CHUNK = 1 << 20  # bytes tokenized at a time, so that a file of any size passes through


@dataclasses.dataclass(frozen=True)
class _Window:
    """ids: i32 [n + 1], n inputs and the last target; known: how many targets a window before it scored."""

    ids: np.ndarray
    known: int

    def __len__(self) -> int:
        return len(self.ids) - 1


def eval_batches(
    cfg: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1, overlap: int = 0
) -> Iterator[Batch]:
    """Yields the batches of one pass over cfg.sources in the split cfg.split, shaped like make_iterator's.

    Every document starts in a segment of its own and is read in windows of seq_len; windows that end short
    share a row with the next ones, as other segments. The loss mask is True exactly once for every token that
    something precedes in its document: all but the first, which is bos where the tokenizer has one. The last
    batch is filled up with padding.
    overlap: every window that continues a document begins with this many tokens of the one before, unscored.
    seed, shuffle, weights, piece_bytes, whole, prompt_end, stochastok and fim have no meaning here. Every process
    tokenizes the whole split and gets the same number of batches.
    """
    if not 0 <= overlap < cfg.seq_len:
        raise AtomError(f"overlap is {overlap}: it must be at least 0 and below seq_len {cfg.seq_len}.")
    if not 0 <= process_index < process_count or cfg.batch_size % process_count:
        raise AtomError(
            f"data.batch_size {cfg.batch_size} cannot be read by process {process_index} of {process_count}: "
            "it must divide by the number of processes."
        )
    corpora = [open_source(source, cfg.split) for source in cfg.sources]
    mine = slice(*(cfg.batch_size // process_count * (process_index + i) for i in (0, 1)))
    return ({k: v[mine] for k, v in batch.items()} for batch in _batches(cfg, tokenizer, corpora, overlap))


def _batches(cfg: DataConfig, tokenizer: Tokenizer, corpora: list[Corpus], overlap: int) -> Iterator[Batch]:
    def new_batch():
        return empty_batch(cfg.batch_size, cfg.seq_len, tokenizer.pad_id)

    batch, row, at, segment = new_batch(), 0, 0, 0
    for corpus in corpora:
        for window in _windows(corpus, tokenizer, cfg.seq_len, overlap):
            if at + len(window) > cfg.seq_len:
                row, at, segment = row + 1, 0, 0
                if row == cfg.batch_size:
                    yield batch
                    batch, row = new_batch(), 0
            segment += 1
            counts = np.arange(len(window.ids)) > window.known
            place(batch, row, at, segment, window.ids, len(window), counts)
            at += len(window)
    if at:
        yield batch


def _windows(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, overlap: int) -> Iterator[_Window]:
    chunks = Pieces(corpus, _CHUNK)
    for k in range(len(chunks)):
        chunk = chunks[k]
        ids = piece_ids(chunk, tokenizer)
        if chunk["first"]:
            held, known = ids, 0
        else:
            held = np.concatenate([held, ids])
        while len(held) > seq_len + 1:
            yield _Window(held[: seq_len + 1], known)
            held, known = held[seq_len - overlap :], overlap
        if chunk["last"] and len(held) > known + 1:
            yield _Window(held, known)
