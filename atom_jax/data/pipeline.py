"""The training stream: sources -> shuffled pieces (Grain) -> one lane per row -> packed batches.

The pieces form one endless sequence, reshuffled in every epoch. Lane r takes every batch_size-th piece from
the r-th on and becomes row r of every batch. So a row depends on the configuration and its number only: the
global batch is the same however many processes share it, and a lane's whole state is two numbers, the piece
it is in and the tokens used.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grain
import numpy as np

from atom_jax.data import augment
from atom_jax.data.config import DataConfig
from atom_jax.data.conversations import conversation_tokens
from atom_jax.data.packing import Batch, Tokens, empty_batch, piece_tokens, place, subwords
from atom_jax.data.pieces import Pieces
from atom_jax.data.sources import open_source
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.tokenizers.bytes import ByteTokenizer
from atom_jax.typing import AtomError

_AHEAD = 2  # batches prepared before they are asked for
_THREADS = 4  # tokenizers release the interpreter lock
_EMPTY_LIMIT = 10_000  # pieces without a token in a row, after which the source is called empty
_FEW = 1000  # pieces of a text that may be tiny
_LATER = (
    "marks", "tokens", "whole", "prompt_end", "chat", "stochastok", "fim", "fim_layouts", "fim_cut", "fim_middle"
)  # fmt: skip
_WHOLE = 1 << 62  # bytes of a piece that is a document, however long


def make_iterator(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    kind: Callable[..., grain.DatasetIterator] | None = None,
) -> grain.DatasetIterator:
    """Returns an endless iterator of {"ids", "positions", "segments", "targets": i32, "loss_mask": bool}, and
    "marks": bool when cfg.marks asks for them, "loss_weights": f32 where a source has them (cfg.weighs); with
    cfg.tokens, of what `BolmoTokenizer.spell` returns.

    Each array is [batch_size / process_count, seq_len]: rows process_index * that many and on of the global
    batch. Batches are prepared in a background thread. get_state() gives a dict for JSON, and set_state()
    continues exactly after the batch returned last; it takes the state of a process with the same rows, or
    any that `merge_states` made. close() stops the thread. kind: makes other batches than these, a subclass of
    `PackedRows` with its arguments. Raises AtomError for bad sources and a batch_size that the processes cannot
    share.
    """
    numbers = row_numbers(cfg, process_index, process_count)
    kind = kind or (_SpelledRows if cfg.tokens else PackedRows)
    packed = kind(cfg, tokenizer, open_pieces(cfg, tokenizer), numbers)
    iterator = _Ahead(packed, prefetch_buffer_size=_AHEAD)
    _open_iterators.add(iterator)
    return iterator


def row_numbers(cfg: DataConfig, process_index: int = 0, process_count: int = 1) -> range:
    """The rows of every batch that a process reads. Raises AtomError for a batch that the processes cannot share."""
    if not 0 <= process_index < process_count:
        raise AtomError(f"process_index {process_index} is not below process_count {process_count}.")
    if cfg.batch_size % process_count:
        raise AtomError(f"data.batch_size {cfg.batch_size} does not divide by the {process_count} processes.")
    rows = cfg.batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def reader(cfg: DataConfig, tokenizer: Tokenizer, units: Tokenizer | None = None) -> Callable[[dict], Tokens]:
    """What makes tokens of the pieces of a configuration, each with its "number" in the endless stream (0 without);
    units: of `cfg.marks`. Raises AtomError for tokenizers that lack what it asks for."""
    if cfg.tokens:
        return functools.partial(subwords, tokenizer=tokenizer)
    if cfg.chat:
        read = functools.partial(conversation_tokens, tokenizer=tokenizer)
    elif cfg.fim:
        read = augment.Infilled.of(cfg, tokenizer)
    else:
        read = functools.partial(piece_tokens, tokenizer=tokenizer, units=units, prompt_end=cfg.prompt_end)
    return augment.Scattered.of(cfg, tokenizer, read) if cfg.stochastok else read


def remarks(cfg: DataConfig, tokenizer: Tokenizer, pieces: int) -> list[str]:
    """What is to be said of the text before training: that it is hardly any, and the share of documents that
    `cfg.whole` leaves out for their length, among 256 of each source. pieces: how many there are. Raises AtomError
    where it would leave out all of a source."""
    notes, sizes = [], []
    if pieces > _FEW and not cfg.whole and not cfg.weighs:
        return notes
    opened = open_pieces(cfg, tokenizer)
    known = [found.corpus.sizes for found in opened if found.corpus.sizes is not None]
    total = sum(int(x.sum()) for x in known)
    if len(known) == len(opened) and total < cfg.batch_size * cfg.seq_len:
        rows = f"{cfg.batch_size} rows of {cfg.seq_len} tokens"
        notes.append(f"data: the {cfg.split} split is tiny, {total:,} bytes, and one batch has {rows}")
    tokens = reader(cfg, tokenizer)
    for found in opened:
        if not cfg.whole and not hasattr(found.corpus, "marked"):
            continue
        sample = np.unique(np.linspace(0, len(found) - 1, 256).astype(np.int64))
        lengths = [len(tokens(found[int(k)]).ids) for k in sample]
        if min(lengths) > cfg.seq_len:
            raise AtomError(
                f"data.seq_len is {cfg.seq_len}: documents of {found.corpus.what} are never cut, and the shortest of"
                f" {len(lengths)} has {min(lengths):,} tokens"
            )
        sizes += lengths
    if sizes and (share := float(np.mean(np.array(sizes) > cfg.seq_len))):
        notes.append(f"data: {share:.0%} of the documents are longer than {cfg.seq_len} tokens and left out")
    return notes


class _Ahead(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching, closed once: a second time fails when the interpreter is shutting down."""

    def close(self) -> None:
        if not getattr(self, "_closed", True):
            super().close()


_open_iterators: weakref.WeakSet[_Ahead] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_open_iterators):
        iterator.close()


def merge_states(states: Sequence[dict]) -> dict:
    """Joins the states of all processes after one step; any number of processes can restore the result."""
    states = sorted(states, key=lambda s: s["first_row"])
    merged = {"config": states[0]["config"], "first_row": 0, "piece": [], "used": []}
    for state in states:
        if state["first_row"] != len(merged["piece"]) or state["config"] != merged["config"]:
            raise AtomError("The data states are not those of all processes of one run.")
        merged["piece"] += state["piece"]
        merged["used"] += state["used"]
    if len(merged["piece"]) != merged["config"]["batch_size"]:
        raise AtomError("The data states are not those of all processes of one run.")
    return merged


def open_pieces(cfg: DataConfig, tokenizer: Tokenizer) -> list[Pieces]:
    """Returns the pieces of every source, in the sources' own order."""
    size = cfg.piece_bytes or 8 * cfg.seq_len * (1 if isinstance(tokenizer, ByteTokenizer) else 4)
    size = _WHOLE if cfg.whole else size
    return [Pieces(open_source(source, cfg.split, cfg.chat), size) for source in cfg.sources]


def piece_stream(cfg: DataConfig, found: Sequence[Pieces]) -> grain.MapDataset:
    """Returns the endless MapDataset of {"text": bytes, "first": bool, "last": bool} that training reads."""
    parts = [grain.MapDataset.source(p) for p in found]
    if not cfg.weights:
        parts = [grain.MapDataset.concatenate(parts)]
    if cfg.shuffle:
        parts = [p.seed(cfg.seed + i).shuffle() for i, p in enumerate(parts)]
    parts = [p.repeat() for p in parts]
    if not cfg.weights:
        return parts[0]
    # Grain counts pieces, the weights count bytes.
    counts = [w / p.mean_bytes() for w, p in zip(cfg.weights, found)]
    return grain.MapDataset.mix(parts, weights=[c / sum(counts) for c in counts])


class PackedRows(grain.DatasetIterator):
    """The given rows of every batch. read: what makes tokens of pieces, where it is not `reader`."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        found: Sequence[Pieces],
        numbers: range,
        read: Callable[[dict], Tokens] | None = None,
    ):
        super().__init__()
        # First, since Grain closes also what could not be made.
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        stream = piece_stream(cfg, found)
        self.seq_len = cfg.seq_len
        self.first_row = numbers.start
        self.pad_id = tokenizer.pad_id
        self.units = trained_tokenizer(cfg.marks, cfg.sources) if cfg.marks else None
        self.identity = _identity(cfg, tokenizer, found)
        tokens = read or reader(cfg, tokenizer, self.units)
        self.weighs = cfg.weighs
        self.lanes = [_Lane(r, cfg.batch_size, stream, tokens, self.pool, cfg.seq_len, cfg.whole) for r in numbers]

    def __next__(self) -> Batch:
        batch = empty_batch(len(self.lanes), self.seq_len, self.pad_id, self.units is not None, self.weighs)
        for row, lane in enumerate(self.lanes):
            lane.fill(batch, row)
        return batch

    def get_state(self) -> dict:
        return {
            "config": self.identity,
            "first_row": self.first_row,
            "piece": [lane.piece for lane in self.lanes],
            "used": [lane.used for lane in self.lanes],
        }

    def set_state(self, state: dict) -> None:
        if not isinstance(state, dict) or state.keys() != self.get_state().keys():
            raise AtomError("The data state is not one that this iterator made.")
        _compare(state["config"], self.identity)
        skip = self.first_row - state["first_row"]
        if skip < 0 or skip + len(self.lanes) > len(state["piece"]):
            raise AtomError("The data state holds other rows than this process reads: use merge_states.")
        for i, lane in enumerate(self.lanes, skip):
            lane.seek(int(state["piece"][i]), int(state["used"][i]))

    def close(self) -> None:
        super().close()
        self.pool.shutdown(wait=False, cancel_futures=True)


class _SpelledRows(PackedRows):
    """The given rows of every batch, as subwords and as their bytes."""

    def __init__(self, cfg: DataConfig, tokenizer: BolmoTokenizer, found: Sequence[Pieces], numbers: range):
        super().__init__(cfg, tokenizer, found, numbers)
        self.tokenizer, self.tokens = tokenizer, cfg.tokens

    def __next__(self) -> Batch:
        rows = [lane.take(self.tokens - 1, lambda ids: self.tokenizer.room(ids, self.seq_len)) for lane in self.lanes]
        return self.tokenizer.spell(rows, self.tokens, self.seq_len)


class _Lane:
    """The endless tokens of one row: `piece` counts its pieces, `used` the tokens taken of the current. whole: no
    piece is cut, and those with more tokens than `longest` are left out; so are those with weights in any case."""

    def __init__(
        self,
        row: int,
        stride: int,
        stream: grain.MapDataset,
        tokens: Callable[[dict], Tokens],
        pool: ThreadPoolExecutor,
        longest: int,
        whole: bool,
    ):
        self.row = row
        self.stride = stride
        self.stream = stream
        self.read = tokens
        self.pool = pool
        self.longest, self.whole = longest, whole
        self.seek(0, 0)

    def seek(self, piece: int, used: int) -> None:
        self.piece = piece
        self.used = used
        self.tokens: Tokens | None = None
        self.next: Future | None = None

    def fill(self, batch: Batch, row: int) -> None:
        at, segment, seq_len = 0, 0, batch["ids"].shape[1]
        while at < seq_len:
            tokens = self._load()
            ids, marks, learned, weights = (None if x is None else x[self.used :] for x in tokens)
            take = min(seq_len - at, len(ids))
            if self._is_whole(tokens) and take < len(ids):
                break
            segment += 1
            place(batch, row, at, segment, ids, take, learned, weights)
            if marks is not None:
                batch["marks"][row, at : at + take] = marks[:take]
            at += take
            self.used += take

    def take(self, most: int, room: Callable[[np.ndarray], int]) -> np.ndarray:
        """The next tokens of the current piece, as many as `most` and `room` allow."""
        ids = self._load().ids[self.used : self.used + most]
        # A token without room in an empty row is left out.
        count = max(room(ids), 1)
        self.used += count
        return ids[:count]

    def _load(self) -> Tokens:
        """The current piece, once it has tokens left."""
        if self.tokens is None:
            self.tokens = self._tokens(self.piece)
            self.next = self.pool.submit(self._tokens, self.piece + 1)
        for _ in range(_EMPTY_LIMIT):
            size = len(self.tokens.ids)
            if self.used < size and (size <= self.longest or not self._is_whole(self.tokens)):
                return self.tokens
            self.tokens = self.next.result()
            self.piece, self.used = self.piece + 1, 0
            self.next = self.pool.submit(self._tokens, self.piece + 1)
        what = (
            f"that are empty or longer than {self.longest} tokens"
            if self._is_whole(self.tokens)
            else "without a token"
        )
        raise AtomError(f"The data sources gave {_EMPTY_LIMIT} documents in a row {what}.")

    def _is_whole(self, tokens: Tokens) -> bool:
        return self.whole or tokens.weights is not None

    def _tokens(self, piece: int) -> Tokens:
        number = self.row + piece * self.stride
        return self.read(self.stream[number] | {"number": number})


def _identity(cfg: DataConfig, tokenizer: Tokenizer, found: Sequence[Pieces]) -> dict:
    """Returns what must be equal for a state to mean the same place in the same text, in JSON's types."""
    identity = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}
    for name in _LATER:
        if not identity[name]:
            del identity[name]  # states from before there were such rows stay valid
    content = {"pieces": [len(p) for p in found], "content": [p.corpus.crc for p in found]}
    return identity | {"vocab_size": tokenizer.vocab_size} | content


def _compare(saved: dict, ours: dict) -> None:
    """Raises AtomError where two identities differ: the text counts, not what its files are called."""
    # States from before there were checksums of the text know its name only.
    unused = "sources" if "content" in saved else "content"
    for field in ours | {name: None for name in _LATER if saved.get(name)}:
        before, value = saved.get(field), ours.get(field)
        if field == unused or before == value:
            continue
        if field in ("content", "pieces") and isinstance(before, list) and len(before) == len(value):
            names = ", ".join(s for s, a, b in zip(ours["sources"], before, value) if a != b)
            raise AtomError(f"data.sources: the text of {names} is not the one that this run began with.")
        raise AtomError(f"The data state was saved with {field}={before!r}, and this run has {value!r}.")
