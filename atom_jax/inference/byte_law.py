"""What a model over tokens says about bytes: exact probabilities, whatever its tokenizer is (`tokenizers.covers`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax.inference.score import logprobs
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.models.family import Codec
from atom_jax.session import programs
from atom_jax.session.session import Session
from atom_jax.tokenizers.base import beginning
from atom_jax.tokenizers.bytes import ByteTokenizer, to_utf8
from atom_jax.tokenizers.canonical import Canonical
from atom_jax.tokenizers.covers import Covers, common, contexts_of, log_sum
from atom_jax.typing import LM, AtomError

# Bytes whose laws exist at once; rows that are read side by side, and what their lengths are multiples of: then few
# shapes are compiled.
_PART, _ROWS, _WIDTH = 64, 8, 2


def byte_logprobs(lm: LM, text: str | bytes, invalid: str = "renormalise") -> np.ndarray:
    """Log-probability f64 [n], in nats, of each byte of a text in UTF-8, given those before it; of the first one
    given that a text begins.

    invalid: what becomes of the probability that the model gives to tokens that its tokenizer would never put there:
    "renormalise" (the others get it) or "drop" (it is lost, and bytes are normalised).
    The model is called about twice per token of the text. Raises AtomError for models whose ids are neither subwords
    nor bytes, and for texts that are too long or that the tokenizer can't write.
    """
    data = to_utf8(text)
    if invalid not in ("renormalise", "drop"):
        raise AtomError(f"invalid={invalid!r}: expected renormalise or drop")
    canonical, front = canonical_of(lm), _front(lm)
    if isinstance(lm.tokenizer, ByteTokenizer):
        ids = np.concatenate([front, lm.tokenizer.encode(data)]).astype(np.int32)
        return np.asarray(logprobs(lm, ids[None]), np.float64)[0, len(front) - 1 :]
    covers = Covers(canonical, renormalise=invalid == "renormalise")
    path = tuple(np.asarray(lm.tokenizer.encode(data)).tolist())
    read = _walk(covers, _Reader.begin(lm, front, len(path)), data, path)
    return np.array([logp for logp, _, _ in read], np.float64)


@dataclasses.dataclass(frozen=True)
class ByteLaw:
    """The law of the next byte after a text. `next`: log-probabilities f64 [257], in nats; the last one is that the
    text ends. The model is called once per byte, and once more for every token that is settled."""

    covers: Covers
    next: np.ndarray
    _reader: _Reader = dataclasses.field(repr=False)
    _logps: list[np.ndarray] = dataclasses.field(repr=False)

    @classmethod
    def begin(cls, lm: LM, text: str | bytes = b"", room: int = 256) -> ByteLaw:
        """After a text, which may end anywhere, also inside a token or a character. room: bytes that may follow."""
        data = text if isinstance(text, bytes) else to_utf8(text)
        canonical, encode = canonical_of(lm), lm.tokenizer.encode
        ids = tuple(np.asarray(encode(data.decode("utf-8", errors="ignore"))).tolist())
        ids = ids[: canonical.settled(ids)]
        rest = data[len(canonical.text(ids)) :]
        reader = _Reader.begin(lm, [*_front(lm), *ids], room + len(rest), len(ids))
        covers = Covers(canonical, {ids: 0.0})
        *_, latest = [(0.0, covers, reader), *_walk(covers, reader, rest, ids)]
        return cls._at(*latest[1:])

    @classmethod
    def _at(cls, covers: Covers, reader: _Reader) -> ByteLaw:
        path = covers.stable
        reader, laws = reader.laws(list(covers.wholes), path, len(path))
        logps = covers.masked(laws.__getitem__)
        return cls(covers, covers.next_bytes(logps), reader, logps)

    def push(self, byte: int) -> ByteLaw:
        """The law once the text goes on with this byte. AtomError for one that can't follow."""
        covers = self.covers.push(byte, self._logps)
        if covers.log_total == -np.inf:
            raise AtomError(f"byte {byte} cannot follow this text")
        return self._at(covers, self._reader)


def _walk(
    covers: Covers, reader: _Reader, data: bytes, path: tuple[int, ...]
) -> Iterator[tuple[float, Covers, _Reader]]:
    """For every byte of a text that goes on: its log-probability, the covers after it, and what has been read. path:
    the tokens of the whole text, or their beginning."""
    for first in range(0, len(data), _PART):
        part = data[first : first + _PART]
        asked, end = contexts_of(covers, part)
        reader, laws = reader.laws(asked, path, len(common([end.stable, path])))
        for byte in part:
            logps = covers.masked(laws.__getitem__)
            law = covers.next_bytes(logps)
            covers = covers.push(byte, logps)
            yield law[byte], covers, reader


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A model that has read `at` tokens of a path, after its front."""

    lm: LM
    session: Session
    at: int = 0

    @classmethod
    def begin(cls, lm: LM, ids: Sequence[int], room: int, at: int = 0) -> _Reader:
        """Once it has read these ids, the last `at` of them after the front."""
        # Stacked layers: there are several small programs, and they compile in a fraction of the time.
        row, length = np.array([ids], np.int32), np.array([len(ids)], np.int32)
        capacity = bucket(len(ids) + room + _WIDTH)
        session = Session.begin(lm, row, length, capacity=capacity, params=lm.params, unroll=False)
        return cls(lm, session, at)

    def laws(
        self, contexts: Sequence[tuple[int, ...]], path: tuple[int, ...], keep: int
    ) -> tuple[_Reader, dict[tuple[int, ...], np.ndarray]]:
        """Log-probabilities f64 [ids] after each of these sequences, which are grouped by where they leave the path;
        and the reader once it has read no more than `keep` tokens of that."""
        leaves: dict[int, list[tuple[int, ...]]] = {}
        for ids in contexts:
            leaves.setdefault(len(common([ids, path])), []).append(ids)
        reader, kept, out = self, self, {}
        for at in sorted({*leaves, max(keep, self.at)}):
            reader = reader._to(path, at)
            kept = reader if at <= keep else kept
            out |= reader._after(leaves.get(at, []))
        return kept, out

    def _to(self, path: tuple[int, ...], at: int) -> _Reader:
        if at == self.at:
            return self
        session = self.session.fork().extend([list(path[self.at : at])])
        return dataclasses.replace(self, session=session, at=at)

    def _after(self, contexts: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """The laws after sequences that begin with what was read."""
        here = [ids for ids in contexts if len(ids) == self.at]
        away = [ids for ids in contexts if len(ids) > self.at]
        out = {ids: np.asarray(self.session.logits[0]) for ids in here}
        for first in range(0, len(away), _ROWS):
            part = away[first : first + _ROWS]
            rows = 1 if len(part) == 1 else _ROWS
            width = -(-max(len(ids) - self.at for ids in part) // _WIDTH) * _WIDTH
            draft, counts = np.zeros((rows, width), np.int32), np.zeros(rows, np.int64)
            for row, ids in enumerate(part):
                draft[row, : len(ids) - self.at], counts[row] = ids[self.at :], len(ids) - self.at
            session = self.session if rows == 1 else self.session.rows([0] * rows)
            x_bd = session.verify(draft, counts).x_bnd[np.arange(rows), counts]
            logits = np.asarray(programs.logits(session.params, x_bd, cfg=self.lm.config))
            out |= dict(zip(part, logits))
        size = canonical_of(self.lm).view.size
        return {ids: _log_softmax(logits)[:size] for ids, logits in out.items()}


def canonical_of(lm: LM) -> Canonical:
    """Of the model's tokenizer; made once. Raises AtomError for models that have none that fits."""
    if lm.tokenizer is None:
        raise AtomError("the model has no tokenizer, so its tokens stand for no bytes")
    if type(registry.of(lm.config).codec(lm.config)) is not Codec:
        raise AtomError(f"{lm.family}: its ids are neither subwords nor plain bytes")
    if "canonical" not in lm.kept:
        canonical = Canonical(lm.tokenizer)
        if canonical.view.size > lm.config.vocab_size:
            raise AtomError(f"the tokenizer has {canonical.view.size} ids, the model {lm.config.vocab_size}")
        lm.kept["canonical"] = canonical
    return lm.kept["canonical"]


def _front(lm: LM) -> list[int]:
    front = [] if lm.tokenizer is None else beginning(lm.tokenizer)
    if not front:
        raise AtomError("the model has no token that begins a text, so the first byte has no probability")
    return front


def _log_softmax(logits: Any) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    return x - log_sum(x)
