"""Exact probabilities of bytes under a model over tokens (Phan et al., 2024, "Exact Byte-Level Probabilities from
Tokenized Language Models", 2410.09303).

A text x is covered by every canonical sequence of tokens whose last token holds the last byte of x: they are what a
model could have written when x has been seen. P(x) is the sum of their probabilities. One more byte keeps the covers
whose next byte it is, and begins new ones where a token ended with x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from atom_jax.tokenizers.canonical import Canonical
from atom_jax.typing import AtomError

# What a token sequence says about the next token: log-probabilities f64 [ids].
Law = Callable[[tuple[int, ...]], np.ndarray]
END = 256


@dataclasses.dataclass(frozen=True)
class Covers:
    """The covers of a text.

    canonical: of the tokenizer. wholes: covers that end with the text, and their log-probabilities: its own encoding,
    and, within a run of spaces, those that it may turn out to have. contexts: what comes before the last tokens of
    the other covers; context i32, token i32, at i32, logw f64 [c]: of each of these the context, the last token, how
    many of its bytes are seen, and the log-probability.
    renormalise: whether tokens that can't follow leave their probability to the others; else it is lost, and bytes
    are normalised only at the end.
    """

    canonical: Canonical
    wholes: dict[tuple[int, ...], float] = dataclasses.field(default_factory=lambda: {(): 0.0})
    contexts: tuple[tuple[int, ...], ...] = ()
    context: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    token: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    at: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    logw: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    renormalise: bool = True

    @property
    def log_total(self) -> float:
        """Log-probability of the text."""
        return log_sum(np.array([*self.logw, *self.wholes.values()]))

    @property
    def stable(self) -> tuple[int, ...]:
        """Tokens with which all covers begin, and so all sequences after which a law will be asked for."""
        return common([*self.contexts, *self.wholes])

    def masked(self, law: Law) -> list[np.ndarray]:
        """Log-probabilities f64 [ids] of the tokens that may follow each of `wholes`; tokens that have less than a
        millionth together pass as such."""
        out = []
        for ids in self.wholes:
            logp = np.where(self.canonical.first <= END, law(ids), -np.inf)
            looked_at = self.canonical.likely(logp)
            logp[looked_at[~self.canonical.follows(ids, looked_at)]] = -np.inf
            out.append(logp - log_sum(logp) if self.renormalise else logp)
        return out

    def next_bytes(self, logps: list[np.ndarray]) -> np.ndarray:
        """Log-probabilities f64 [257] of the next byte, or (END) that the text ends. logps: what `masked` returns."""
        named = self.canonical.first <= END
        pairs = [(self.canonical.byte_at(self.token, self.at), self.logw)]
        pairs += [(self.canonical.first[named], p[named] + w) for p, w in zip(logps, self.wholes.values())]
        byte, weight = (np.concatenate(column) for column in zip(*pairs))
        high = weight.max(initial=-np.inf)
        if high == -np.inf:
            raise AtomError("no token can follow this text")
        with np.errstate(divide="ignore"):
            out = np.log(np.bincount(byte, np.exp(weight - high), minlength=END + 1))
        return out - log_sum(out)

    def push(self, byte: int, logps: list[np.ndarray]) -> Covers:
        """The covers once the text goes on with this byte."""
        kept = self.canonical.byte_at(self.token, self.at) == byte
        parts = [(self.context[kept], self.token[kept], self.at[kept] + 1, self.logw[kept])]
        contexts, starting = [*self.contexts, *self.wholes], self.canonical.ids_by_first[byte]
        for i, (logp, (whole, weight)) in enumerate(zip(logps, self.wholes.items()), len(self.contexts)):
            ids = starting[logp[starting] > -np.inf]
            ids = ids[self.canonical.follows(whole, ids)].astype(np.int32)
            parts.append((np.full_like(ids, i), ids, np.ones_like(ids), logp[ids] + weight))
        context, token, at, logw = (np.concatenate(columns) for columns in zip(*parts))
        done = at == self.canonical.sizes[token]
        wholes = {(*contexts[context[i]], int(token[i])): float(logw[i]) for i in np.flatnonzero(done)}
        used, context = np.unique(context[~done], return_inverse=True)
        return dataclasses.replace(
            self, wholes=wholes, contexts=tuple(contexts[i] for i in used), context=context.astype(np.int32),
            token=token[~done], at=at[~done], logw=logw[~done],
        )  # fmt: skip


def contexts_of(covers: Covers, text: bytes) -> tuple[list[tuple[int, ...]], Covers]:
    """The sequences after which laws are asked for while a text goes on, and the covers at its end, without a model
    (their probabilities mean nothing). Raises AtomError for bytes that no token stands for."""
    even, out = np.zeros(covers.canonical.view.size), []
    for byte in text:
        out += covers.wholes
        covers = covers.push(byte, [even] * len(covers.wholes))
        if not covers.wholes and not len(covers.token):
            raise AtomError(f"{covers.canonical.view.name}: no tokens stand for byte {byte} of this text")
    return out, covers


def log_sum(x: np.ndarray) -> float:
    """Logarithm of the sum of exp(x), -inf for none."""
    high = x.max(initial=-np.inf)
    return float(high + np.log(np.exp(x - high).sum())) if high > -np.inf else -np.inf


def common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning of all."""
    low, high = min(rows), max(rows)
    n = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:n]
