"""Training texts told otherwise, piece by piece, before they are packed: middles to be filled in, and tokens cut in
two. What is drawn depends on the seed and on the number of the piece alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from atom_jax.data.config import LAYOUTS, DataConfig
from atom_jax.data.packing import Tokens, ends, piece_tokens
from atom_jax.tokenizers import stochastok
from atom_jax.tokenizers.base import Tokenizer
from atom_jax.tokenizers.byte_view import ByteView, byte_view
from atom_jax.typing import AtomError

Read = Callable[[dict], Tokens]
# What makes the draws of either change independent of the other's.
_STOCHASTOK, _FIM = 1, 2
# How published tokenizers call what stands before a prefix, a suffix and a middle.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Reads pieces with about a share of their tokens cut in two (`tokenizers.stochastok`); parts are learned from
    where the token would have been."""

    read: Read
    splits: stochastok.Splits
    share: float
    seed: int

    @classmethod
    def of(cls, cfg: DataConfig, tokenizer: Tokenizer, read: Read) -> Scattered:
        """Raises AtomError for tokenizers in which no token is made of two others."""
        splits = stochastok.split_table(_view(tokenizer, "stochastok"))
        if not len(splits.left):
            raise AtomError(f"data.stochastok: {tokenizer.name} has no token that is made of two others")
        return cls(read, splits, cfg.stochastok, cfg.seed)

    def __call__(self, piece: dict) -> Tokens:
        """See `pipeline.reader`."""
        tokens = self.read(piece)
        ids, source = stochastok.scatter(tokens.ids, self.splits, self.share, _drawn(piece, self.seed, _STOCHASTOK))
        learned, weights = (None if x is None else x[source] for x in (tokens.learned, tokens.weights))
        return Tokens(ids, learned=learned, weights=weights)


@dataclasses.dataclass(frozen=True)
class Infilled:
    """Reads a share of the pieces with the middle last, to be filled in from what surrounds it (Bavarian et al.,
    2022, "Efficient Training of Language Models to Fill in the Middle"). marks: ids before prefix, suffix, middle."""

    cfg: DataConfig
    tokenizer: Tokenizer
    marks: tuple[int, int, int]

    @classmethod
    def of(cls, cfg: DataConfig, tokenizer: Tokenizer) -> Infilled:
        """Raises AtomError for tokenizers that name no such marks, or that put a space before every text."""
        found = getattr(tokenizer, "backend", None)
        for names in _MARKS if found is not None else ():
            marks = tuple(found.token_to_id(name) for name in names)
            if None not in marks:
                break
        else:
            raise AtomError(f"data.fim: {tokenizer.name} has no tokens such as {', '.join(_MARKS[0])}")
        if _view(tokenizer, "fim").adds_space:
            raise AtomError(f"data.fim: {tokenizer.name} puts a space before every text, and so before every part")
        return cls(cfg, tokenizer, marks)

    def __call__(self, piece: dict) -> Tokens:
        """See `pipeline.reader`."""
        cfg, rng = self.cfg, _drawn(piece, self.cfg.seed, _FIM)
        if rng.random() >= cfg.fim:
            return piece_tokens(piece, self.tokenizer)
        layouts = cfg.fim_layouts or ("psm", "spm")
        layout = layouts[rng.integers(len(layouts))]
        at = places(piece["text"], cfg.fim_cut, self.tokenizer)
        first, second = sorted(at[rng.integers(len(at), size=2)].tolist())
        head, tail = ends(piece, self.tokenizer)
        ids, middle = infill(piece["text"], (first, second), layout, self.tokenizer, self.marks)
        ids = np.concatenate([head, ids, tail]).astype(np.int32)
        learned = np.concatenate([np.zeros(len(head), bool), middle, np.ones(len(tail), bool)])
        return Tokens(ids, learned=learned if cfg.fim_middle else None)


def infill(
    text: bytes, cuts: tuple[int, int], layout: str, tokenizer: Tokenizer, marks: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A text with the middle last, i32 [n], and which of these tokens are the middle's, bool [n].

    cuts: bytes where the middle begins and ends. layout: of LAYOUTS. marks: ids that stand before prefix, suffix and
    middle. Every part is encoded by itself, as it is when a model is asked to fill in a middle.
    """
    first, second = cuts
    parts = dict(zip("PSM", ([i] for i in marks)))
    parts |= {c: tokenizer.encode(t) for c, t in zip("pms", (text[:first], text[first:second], text[second:]))}
    order = LAYOUTS[layout]
    ids = np.concatenate([parts[c] for c in order]).astype(np.int32)
    return ids, np.repeat([c == "m" for c in order], [len(parts[c]) for c in order])


def places(text: bytes, cut: str, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes i64 [n], ascending, before which a text may be cut: its lines ("line"), its tokens ("token") or its
    characters (""), and its ends."""
    if cut == "token":
        at = tokenizer.spans(text)[1][:, 1]
        after = np.frombuffer(text + b" ", np.uint8)[at]
        at = at[after & 0xC0 != 0x80]  # tokens may end inside a character
    else:
        data = np.frombuffer(text, np.uint8)
        at = np.flatnonzero(data == 10) + 1 if cut == "line" else np.flatnonzero(data & 0xC0 != 0x80)
    return np.unique([0, *at, len(text)]).astype(np.int64)


def _view(tokenizer: Tokenizer, field: str) -> ByteView:
    try:
        return byte_view(tokenizer)
    except AtomError as e:
        raise AtomError(f"data.{field}: {e}") from None


def _drawn(piece: dict, seed: int, what: int) -> np.random.Generator:
    """The generator of a piece, by its number in the endless stream."""
    return np.random.Generator(np.random.Philox(key=[seed, what], counter=[0, 0, 0, piece.get("number", 0)]))
