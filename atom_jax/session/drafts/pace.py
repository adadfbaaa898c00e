"""How long drafts are: what calls of the model cost, and how many tokens of drafts are accepted."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

# Tokens of drafts among which there is a choice, beside none.
LENGTHS = (1, 3, 7, 15)
# What a call with drafts is taken to cost more than one without, as a share of the latter, until that is measured.
GUESS = 0.5
# Weight of what is new in running means.
NEW = 0.3


class Pace:
    """Of rows that are decoded together.

    n: tokens of drafts now, from `LENGTHS` up to `most`, and `most`. seconds: of a call, by its tokens of drafts.
    """

    def __init__(self, most: int):
        self.lengths = [n for n in LENGTHS if n < most] + [most]
        self.n, self.seconds = most, dict[int, float]()
        # By their place in a draft: tokens before which all were accepted, and those of them that were, too.
        self._offered, self._passed = np.zeros((2, most))

    @property
    def measures(self) -> bool:
        """Whether it is still unknown what a call without drafts costs: there are none then."""
        return 0 not in self.seconds

    def price(self, n: int) -> float:
        """What a call with drafts of n tokens costs more, as a share of a call without; negative: none are tried.
        Between the lengths that were measured it is a line."""
        if self.measures:
            return -1.0
        known = sorted(self.seconds)
        if len(known) == 1:
            return GUESS
        if n > known[-1]:
            return self.price(known[-1]) * n / known[-1]
        return max(float(np.interp(n, known, [self.seconds[m] for m in known])) / self.seconds[0] - 1, 0.0)

    def expected(self, n: int) -> float:
        """Tokens that are accepted of a draft of n."""
        share = np.where(self._offered > 0, self._passed / np.maximum(self._offered, 1e-9), np.nan)
        known = np.flatnonzero(self._offered > 0)
        if not known.size:
            return 0.0
        # Where nothing is known, as at the last place before.
        share = np.where(np.arange(len(share)) > known[-1], share[known[-1]], share)
        return float(np.cumprod(share[:n]).sum())

    def take(self, calls: int, wide: int, reached: np.ndarray, seconds: float) -> None:
        """What some calls came to: so many, of which `wide` had drafts of up to n tokens; of reached[i] of these, i
        were accepted."""
        if not wide:
            self._note(0, seconds / calls)
            return
        n, single = len(reached) - 1, (calls - wide) * self.seconds[0]
        self._note(n, max((seconds - single) / wide, self.seconds[0]))
        # Drafts of which at least so many tokens were accepted.
        least = np.cumsum(reached[::-1])[::-1]
        for counts, new in ((self._offered, least[:-1]), (self._passed, least[1:])):
            counts[:n] = (1 - NEW) * counts[:n] + new

    def choose(self, tokens: int, ready: Collection[int], compiling: float) -> None:
        """Sets n for the next `tokens`: another one where that saves more seconds than it takes to compile for it,
        which takes `compiling` where it is not `ready`."""
        if len(self.seconds) < 2:
            return
        each = {n: self.seconds[0] * (1 + self.price(n)) / (1 + self.expected(n)) for n in self.lengths}
        saved = {n: tokens * (each[self.n] - each[n]) - (0 if n in ready else compiling) for n in self.lengths}
        best = max(saved, key=lambda n: saved[n])
        if saved[best] > 0.05 * tokens * each[self.n]:
            self.n = best

    def _note(self, n: int, seconds: float) -> None:
        old = self.seconds.get(n, seconds)
        self.seconds[n] = (1 - NEW) * old + NEW * seconds
