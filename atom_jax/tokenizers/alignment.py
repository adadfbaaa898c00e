"""Two tokenisations of one text, aligned by its bytes: the shortest chunks that begin and end with a token on both
sides (Minixhofer et al., 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
2503.20083).

A text is given in units: text, or the role of a special token (`byte_view.ROLES`), which each side writes its own
way. Special tokens are so known from the beginning, and never looked for among tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atom_jax.tokenizers.byte_view import ByteView
from atom_jax.typing import AtomError


class Role(NamedTuple):
    """A special token by what it is for, one of `byte_view.ROLES`."""

    name: str


class Side(NamedTuple):
    """One tokenisation: ids i32 [n], and the chunk of each token, i32 [n], -1 for tokens beyond the last chunk."""

    ids: np.ndarray
    chunks: np.ndarray


def aligned(units: Sequence[str | bytes | Role], sides: Sequence[tuple[Any, ByteView]]) -> list[Side]:
    """The text as either of two tokenizers (with their views) has it, and the chunks, numbered from 0.

    A role that one side lacks is left out there; on the other side its token is in the chunk that follows. Where
    either composes characters (NFC), both get them composed. Raises AtomError where the tokenizers make different
    bytes of the text.
    """
    bounds: list[list[np.ndarray]] = [[], []]
    tokens: list[list[np.ndarray]] = [[], []]
    at, composes = 0, any(view.composes for _, view in sides)
    for unit in units:
        if isinstance(unit, Role):
            shared = all(unit.name in view.roles for _, view in sides)
            for side, (_, view) in enumerate(sides):
                if unit.name in view.roles:
                    tokens[side].append(np.array([view.roles[unit.name]], np.int32))
                    bounds[side].append(np.array([[at, at + shared]]))
            at += shared
            continue
        if composes:
            text = unit.decode("utf-8", "surrogateescape") if isinstance(unit, bytes) else unit
            unit = unicodedata.normalize("NFC", text)
        ends = []
        for side, (tokenizer, view) in enumerate(sides):
            ids, spans = bytes_of(tokenizer, view, unit)
            tokens[side].append(ids)
            bounds[side].append(spans + at)
            ends.append(int(spans[-1, 1]) if len(spans) else 0)
        if ends[0] != ends[1]:
            raise AtomError(f"the tokenizers make {ends[0]} and {ends[1]} bytes of {unit[:40]!r}")
        at += ends[0]
    chunks = chunk_ids(*(np.concatenate([np.zeros((0, 2), np.int64), *spans]) for spans in bounds))
    return [Side(np.concatenate([np.zeros(0, np.int32), *ids]), of) for ids, of in zip(tokens, chunks)]


def bytes_of(tokenizer: Any, view: ByteView, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32 [n] of a text, and the bytes i64 [n, 2] that they stand for, without a space that the tokenizer puts
    in front; names of special tokens stand for themselves."""
    ids = np.asarray(tokenizer.encode(text), np.int32)
    pieces = [view.pieces.get(i, view.special.get(i, "").encode("utf-8")) for i in ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces])
    if view.adds_space and pieces and pieces[0].startswith(b" "):
        ends = ends - 1
    return ids, np.stack([np.append(0, ends[:-1]), ends], axis=1) if len(ids) else np.zeros((0, 2), np.int64)


def chunk_ids(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chunk i32 of each token, from the bytes i64 [n, 2] and [m, 2] that the tokens of both sides stand for. A
    chunk ends wherever both sides have a token that ends; tokens of no bytes belong to what follows."""
    cuts = np.intersect1d(a[:, 1][a[:, 1] > a[:, 0]], b[:, 1][b[:, 1] > b[:, 0]])
    found = (np.searchsorted(cuts, side[:, 0], side="right") for side in (a, b))
    return tuple(np.where(at < len(cuts), at, -1).astype(np.int32) for at in found)


def merged(sides: Sequence[Side], closes: np.ndarray) -> list[Side]:
    """Larger chunks: those that may not close, False in bool [chunks], go on into the next; the last one closes."""
    group = np.cumsum(np.append(0, closes[:-1]))
    return [Side(ids, np.where(chunks < 0, -1, group[chunks]).astype(np.int32)) for ids, chunks in sides]


def last_tokens(side: Side) -> np.ndarray:
    """The place, i64 [chunks], of the last token of each chunk."""
    places = np.flatnonzero(side.chunks >= 0)
    return places[np.append(np.diff(side.chunks[places]) > 0, True)] if len(places) else places


def closes_at_spaces(sides: Sequence[Side], views: Sequence[ByteView]) -> np.ndarray:
    """bool [chunks]: chunks after which on both sides a token begins with a space, or a special token stands before
    or after the end."""
    return np.logical_and(*(_at_space(side, view) for side, view in zip(sides, views)))


def _at_space(side: Side, view: ByteView) -> np.ndarray:
    spaced = [i in view.special or view.pieces.get(i, b"")[:1] == b" " for i in side.ids.tolist()]
    special = [i in view.special for i in side.ids.tolist()]
    last = last_tokens(side)
    return np.append(np.array(spaced, bool), True)[last + 1] | np.array(special, bool)[last]
