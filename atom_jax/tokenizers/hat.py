"""Bytes with a symbol after every word, for hierarchical autoregressive transformers (Neitemeier et al., 2025)."""

from __future__ import annotations

import numpy as np
import regex

from atom_jax.tokenizers.bytes import ByteTokenizer, to_utf8

_JOINED = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]"
_FLAG = r"\p{WB=Regional_Indicator}"
# Where a piece ends: Unicode's word boundaries (UAX #29), after punctuation, and where small letters turn capital.
_ENDS = regex.compile(r"(?w)\b|(?<=\p{P})|(?<=\p{Ll})(?=\p{Lu})", regex.V1)
# Boundaries that `regex` overlooks: after marks that follow nothing, and after half a flag.
_MORE = regex.compile(
    rf"(?:(?:\A|(?<=[\r\n\p{{WB=Newline}}])){_JOINED}+|{_FLAG}{_JOINED}*+(?:{_FLAG}{_JOINED}*+)?)"
    r"(?!(?<=\p{WB=ZWJ})\p{Extended_Pictographic})",
    regex.V1,
)
_BLANK = regex.compile(r"\p{White_Space}+")
_PUNCTUATION = regex.compile(r"\p{P}")


class HatTokenizer(ByteTokenizer):
    """Byte b is id b; id 259 ends a word. The other ids are the byte tokenizer's."""

    name = "hat"
    word_end_id = 259

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns i32 [n], the bytes of `text` with id 259 after every word, the last one included.

        Bytes that are not UTF-8 are kept. Raises AtomError when a str holds a lone surrogate.
        """
        return self.spans(text)[0]

    def spans(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids i32 [n], spans i32 [n, 2]): a byte's own, and an empty span where a word ends."""
        data = to_utf8(text)
        # Escaped, bytes that are not UTF-8 pass through str unchanged.
        words = split(data.decode("utf-8", "surrogateescape"))
        ends = np.cumsum([len(word.encode("utf-8", "surrogateescape")) for word in words], dtype=np.int32)
        ids = np.insert(np.frombuffer(data, np.uint8).astype(np.int32), ends, self.word_end_id)
        stops = np.cumsum(ids < 256, dtype=np.int32)
        return ids, np.stack([stops - (ids < 256), stops], axis=1).astype(np.int32)


def split(text: str) -> list[str]:
    """The words of hierarchical autoregressive transformers; together they are `text`.

    Pieces between word boundaries (UAX #29), cut after punctuation and before a capital that follows a small letter,
    are grouped from the left: a single space joins the word after it, punctuation joins what is before it, unless
    that is other white space. "Hello, world!" is "Hello," and " world!".
    """
    cuts = {match.start() for match in _ENDS.finditer(text)} | {match.end() for match in _MORE.finditer(text)}
    words: list[str] = []
    last = "blank"
    start = 0
    for end in sorted((cuts | {len(text)}) - {0}):
        piece, start = text[start:end], end
        kind = _kind(piece)
        if words and ((last == "space" and kind == "word") or (last != "blank" and kind == "punctuation")):
            words[-1] += piece
        else:
            words.append(piece)
        last = kind
    return words


def _kind(piece: str) -> str:
    if piece == " ":
        return "space"
    if _BLANK.fullmatch(piece):
        return "blank"
    return "punctuation" if len(piece) == 1 and _PUNCTUATION.match(piece) else "word"
