"""Token healing: a prompt may end inside a token, which the tokenizer would have cut otherwise had it known how the
text goes on. Its last tokens are taken back, and their bytes are what the next ones have to begin with.

What stands before the bytes that are taken back is kept as it is: other ways to cut that are not looked at, so the
law of the text is not the exact one (`tokenizers.covers` has that).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from atom_jax.tokenizers.byte_view import ByteView


class Healer:
    """Heals the prompts of a vocabulary."""

    def __init__(self, view: ByteView):
        self.view = view
        found = sorted((piece, i) for piece, ids in view.ids.items() for i in ids)
        self._pieces = [piece for piece, _ in found]
        self._ids = np.array([i for _, i in found], np.int64)

    def take_back(self, ids: Sequence[int]) -> tuple[list[int], bytes]:
        """The tokens of a prompt that stay, and the bytes of the others: the most last tokens with which, put
        together, some token begins; the last one at least, but never a special one or one without bytes."""
        rest, dropped, best = b"", 0, (0, b"")
        for i in reversed(ids):
            piece = self.view.pieces.get(int(i))
            if piece is None or len(rest) >= self.view.longest:
                break
            rest, dropped = piece + rest, dropped + 1
            if self._beginning_with(rest).stop > self._beginning_with(rest).start:
                best = dropped, rest
        return [int(i) for i in ids[: len(ids) - best[0]]], best[1]

    def allowed(self, rest: bytes) -> np.ndarray:
        """bool [ids], the tokens that may come next while these bytes are to be written: those that begin with them,
        and those that they begin with. All for b""."""
        out = np.full(self.view.size, not rest)
        if rest:
            out[self._ids[self._beginning_with(rest)]] = True
            for end in range(1, len(rest)):
                out[list(self.view.ids.get(rest[:end], ()))] = True
        return out

    def after(self, rest: bytes, token: int) -> bytes:
        """What is to be written once one of the allowed tokens has been."""
        return rest[len(self.view.pieces[token]) :] if rest else rest

    def _beginning_with(self, rest: bytes) -> slice:
        """Places of tokens that begin with some bytes, in order of bytes."""
        first = bisect.bisect_left(self._pieces, rest)
        # The first bytes after all that begin so; none where they are all 255.
        kept = rest.rstrip(b"\xff")
        last = bisect.bisect_left(self._pieces, kept[:-1] + bytes([kept[-1] + 1])) if kept else len(self._pieces)
        return slice(first, last)
