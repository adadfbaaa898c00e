"""Rows in the tokens of tokenizers that are drawn anew for every batch (Minixhofer et al., 2024, "Zero-Shot Tokenizer
Transfer", 2405.07883), as unigram models of the text around it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax.data import packing
from atom_jax.data.config import DataConfig
from atom_jax.data.packing import Batch, Tokens, empty_batch, place
from atom_jax.data.pieces import Pieces
from atom_jax.data.pipeline import PackedRows
from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.byte_view import byte_view

# Ids of a drawn tokenizer: what begins and ends documents (a name that no text has), bytes, and then pieces.
_END, _OWN = " end", 257
# Words of which it is remembered what pieces are in them, and texts of which it is, what words.
_WORDS, _TEXTS = 1 << 16, 4096


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokenizers are drawn.

    vocabulary: ids of each. texts: pieces of text that the substrings are counted in, the batch's own and those
    before it. noise, spread: to the share of every substring a draw is added whose deviation is itself drawn for each
    tokenizer: its logarithm is normal around that of `noise`, with deviation `spread`. longest: bytes of a piece.

    As published, but for the number of ids and texts; every text of the pool counts, every place where a character
    begins, and white space as anything else.
    """

    vocabulary: int = 4096
    texts: int = 128
    noise: float = 1e-5
    spread: float = 4.0
    longest: int = 15

    def __post_init__(self):
        config.check(
            self, vocabulary=(_OWN + 1, 2**20), texts=(1, 2**16), noise=(0, 1), spread=(0, 100), longest=(2, 64)
        )


class SampledRows(PackedRows):
    """The given rows of every batch, one piece of text each, cut off at its end, in tokens that the batch has alone:
    as `PackedRows` has them, and "sizes" i32 [b, seq_len], the bytes of every target. "surface" i32 and "real" bool
    [b, vocabulary, length], in every row the same: the tokens of the run's own tokenizer that each id is cut into.

    Id 0 begins and ends documents. What is drawn depends on data.seed and the number of the batch alone.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        found: Sequence[Pieces],
        numbers: range,
        how: Sampling,
        length: int,
    ):
        self.view, self.how, self.length, self.seed = byte_view(tokenizer), how, length, cfg.seed
        self.ends = packing.ends({"first": True, "last": True}, tokenizer)
        super().__init__(cfg, tokenizer, found, numbers, lambda piece: Tokens(np.zeros(1, np.int32)))
        self.stream, self.stride = self.lanes[0].stream, self.lanes[0].stride
        self.cut = functools.lru_cache(_WORDS)(lambda piece: tuple(self.view.cut(piece))[:length])
        self.words = functools.lru_cache(_TEXTS)(lambda number: _words(self.stream[number]["text"]))

    def __next__(self) -> Batch:
        number = self.lanes[0].piece
        drawn, pieces = self._drawn(number)
        sizes = np.array([0, *[1] * 256, *map(len, pieces)], np.int32)
        batch = empty_batch(len(self.lanes), self.seq_len, 0)
        for row, lane in enumerate(self.lanes):
            piece = self.stream[lane.row + number * self.stride]
            ids = drawn.encode(piece["text"].decode("utf-8"), add_special_tokens=False).ids
            ids = np.array([*[0] * piece["first"], *ids, *[0] * piece["last"]], np.int32)[: self.seq_len + 1]
            place(batch, row, 0, 1, ids, min(len(ids), self.seq_len))
            lane.seek(number + 1, 0)
        batch["sizes"] = np.where(batch["loss_mask"], sizes[batch["targets"]], 0).astype(np.int32)
        surface = self._surface(pieces)
        every = np.broadcast_to(surface[None], (len(self.lanes), *surface.shape))
        return batch | {"surface": np.maximum(every, 0), "real": every >= 0}

    def _drawn(self, number: int) -> tuple[Any, list[bytes]]:
        """The tokenizer of batch `number`, and the bytes of its ids from 257 on."""
        from tokenizers import Tokenizer as _Tokenizer
        from tokenizers import models, pre_tokenizers

        end = (number + 1) * self.stride
        words: Counter[bytes] = Counter()
        for i in range(max(end - max(self.how.texts, self.stride), 0), end):
            words.update(self.words(i))
        pieces, logp = drawn(words, self.how, np.random.default_rng((self.seed, number)))
        low = float(logp.min(initial=-1.0))
        spelled = _characters()
        entries = [(_END, 2 * low), *((spelled[b], low) for b in range(256))]
        entries += [("".join(spelled[b] for b in piece), p) for piece, p in zip(pieces, logp.tolist())]
        found = _Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=False))
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return found, pieces

    def _surface(self, pieces: list[bytes]) -> np.ndarray:
        """The source's tokens i32 [vocabulary, length] of every id, -1 where there are no more."""
        out = np.full((self.how.vocabulary, self.length), -1, np.int32)
        head, tail = self.ends
        for row, cut in zip(out, [tuple(tail or head), *map(self.cut, [*_BYTES, *pieces])]):
            row[: len(cut)] = cut[: self.length]
        return out


def described(cfg: DataConfig, how: Sampling, length: int) -> Batch:
    """As `packing.described`, for these rows."""
    b, zero = cfg.batch_size, np.int32(0)
    shape = (b, how.vocabulary, length)
    more = {"sizes": np.broadcast_to(zero, (b, cfg.seq_len)), "surface": np.broadcast_to(zero, shape)}
    return packing.described(cfg) | more | {"real": np.broadcast_to(np.bool_(False), shape)}


def drawn(words: Counter[bytes], how: Sampling, rng: np.random.Generator) -> tuple[list[bytes], np.ndarray]:
    """Pieces of two bytes and more, as many as a vocabulary has room for beside single bytes, and their
    log-probabilities f64. words: how often each is in the text. Fewer where the text has fewer."""
    table: dict[bytes, int] = {}
    for word, count in words.items():
        for piece in _substrings(word, how.longest):
            table[piece] = table.get(piece, 0) + len(piece) * count
    pieces = sorted(table)
    share = np.array([table[piece] for piece in pieces], np.float64)
    share /= max(share.sum(), 1.0)
    deviation = math.exp(rng.normal(math.log(how.noise), how.spread)) if how.noise else 0.0
    share += rng.normal(0.0, min(deviation, 1.0), len(share))
    best = np.argsort(-share, kind="stable")[: how.vocabulary - _OWN]
    best = best[share[best] > 0]
    return [pieces[i] for i in best], np.log(share[best])


def _words(text: bytes) -> Counter[bytes]:
    """How often a text has what GPT-2 splits it into."""
    from tokenizers import pre_tokenizers

    parts = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text.decode("utf-8"))
    return Counter(bytes(_byte_of()[c] for c in part) for part, _ in parts)


@functools.lru_cache(_WORDS)
def _substrings(word: bytes, longest: int) -> tuple[bytes, ...]:
    """Parts of two bytes and more that begin with a character."""
    begins = [i for i, b in enumerate(word) if b & 0xC0 != 0x80]
    return tuple(word[i:j] for i in begins for j in range(i + 2, min(i + longest, len(word)) + 1))


@functools.cache
def _byte_of() -> dict[str, int]:
    from atom_jax.tokenizers.json_tokenizer import byte_of_character

    return byte_of_character()


@functools.cache
def _characters() -> dict[int, str]:
    return {b: c for c, b in _byte_of().items()}


_BYTES = [bytes([b]) for b in range(256)]
