"""The units that a model makes of a text: where they begin, how sure the model was, and the text cut into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from atom_jax.chunking import rules
from atom_jax.chunking.types import START
from atom_jax.evaluation.encode import Item, front, windows
from atom_jax.inference import score
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session.prompts import check_model
from atom_jax.tokenizers.bytes import to_utf8
from atom_jax.typing import LM, AtomError

# Tokens that a model sees at once where nothing else is said.
_LONGEST = 2048
_WHITE = np.isin(np.arange(256), [0x20, *range(0x09, 0x0E)])
_VISIBLE = {"\n": "⏎", "\t": "⇥"}
_COLORS = ("\x1b[30;46m", "\x1b[30;43m")
_PLAIN = "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Stage:
    """The units of one stage.

    spans:  i32 [k, 2], the first and one past the last byte of each unit; together they are the text.
    begins: f32 [n], the probability that a unit begins at each byte; 1 or 0 where the rule has no probabilities.
    """

    spans: np.ndarray
    begins: np.ndarray


@dataclasses.dataclass(frozen=True)
class Units:
    """A text of n bytes in units.

    stages:  outermost first; the tokenizer's tokens where the model has no units of its own.
    learned: whether the model has units of its own.
    entropy: f32 [n], nats of the model's distribution of each byte given all before it (nan within longer tokens);
        None for models without units of their own.
    windows: (number, tokens of one, tokens before it that each token has at least): how the text was read.
    """

    text: bytes
    stages: tuple[Stage, ...]
    learned: bool
    entropy: np.ndarray | None
    windows: tuple[int, int, int]


def learned(cfg: Any) -> bool:
    """Whether a model of this configuration chooses its own units."""
    return bool(getattr(cfg, "chunking", ()))


def units(lm: LM, text: str | bytes, length: int = 0) -> Units:
    """The units of a text.

    length: tokens that the model sees at once (0: what it was made for, but no more than 2048). A longer text is read
        in windows that overlap by half.
    Raises AtomError when there is no text, no tokenizer, or the text is not what the tokenizer takes.
    """
    check_model(lm)
    if lm.tokenizer is None:
        raise AtomError("the checkpoint has no tokenizer, so it cannot read a text")
    data = to_utf8(text)
    if not data:
        raise AtomError("the text is empty, so it has no units")
    ids, spans = lm.tokenizer.spans(text)
    if not learned(lm.config):
        begins = np.zeros(len(data) + 1, np.float32)
        begins[spans[:, 0]] = 1
        return Units(data, (_stage(np.flatnonzero(begins), begins),), False, None, (1, len(ids), 0))
    first = front(lm.tokenizer)
    ids = np.concatenate([np.array(first, np.int32), ids])
    spans = np.concatenate([np.zeros((len(first), 2), np.int32), spans])
    length = max(min(length or _LONGEST, lm.config.max_length), 5 if _looks_ahead(lm.config) else 3)
    items = windows(ids, 1, length - 1, (length - 1) // 2)
    marks, probs, surprise = _read(lm, items)
    # The byte at which each token begins; a "token" after the last one begins at the end.
    byte = np.append(spans[:, 0], len(data))
    stages, decided = [], np.ones(len(ids), bool)
    for mark, p, edge in zip(marks, probs, _edges(marks, [rules.of(c.rule).KIND for c in lm.config.chunking])):
        begins = np.zeros(len(data) + 1, np.float32)
        np.maximum.at(begins, byte[edge[decided]], p[decided])
        stages.append(_stage(byte[edge[mark]], begins))
        decided = mark
    entropy = np.full(len(data) + 1, np.nan, np.float32)
    real = spans[1:, 0] < spans[1:, 1]
    entropy[spans[1:, 0][real]] = surprise[real]
    return Units(data, tuple(stages), True, entropy[:-1], (len(items), length, (length - 1) // 2))


def statistics(units: Units, s: int) -> dict[str, float]:
    """Numbers about the units of stage s.

    units, bytes_per_unit; of all units but the first: at_word_edge, the share that begin at or after white space, and
    at_character_edge, the share that begin with a whole UTF-8 character; entropy_at_units and entropy_elsewhere,
    nats: means over the bytes that begin a unit and over all others, the text's first left out. nan where there is
    nothing to count.
    """
    data = np.frombuffer(units.text, np.uint8)
    starts = units.stages[s].spans[1:, 0]
    begins = np.zeros(len(data), bool)
    begins[starts] = True
    out = {
        "units": float(len(starts) + 1),
        "bytes_per_unit": len(data) / (len(starts) + 1),
        "at_word_edge": _mean(_WHITE[data[starts]] | _WHITE[data[starts - 1]]),
        "at_character_edge": _mean((data[starts] & 0xC0) != 0x80),
    }
    if units.entropy is not None:
        out["entropy_at_units"] = _mean(units.entropy[1:][begins[1:]])
        out["entropy_elsewhere"] = _mean(units.entropy[1:][~begins[1:]])
    return out


def render(units: Units, color: bool = False) -> str:
    """The text once per stage, outermost first, with its units in alternating colours or in [brackets], and numbers
    about them under each. Bytes that are no whole character in their unit, and characters that cannot be seen, are
    written like <E2><82>; an end of line is ⏎."""
    blocks = []
    for s, stage in enumerate(units.stages):
        pieces = []
        for i, (begin, end) in enumerate(stage.spans.tolist()):
            piece = visible(units.text[begin:end])
            pieces.append(f"{_COLORS[i % 2]}{piece}{_PLAIN}" if color else f"[{piece}]")
            if b"\n" in units.text[begin:end]:
                pieces.append("\n")
        text = "".join(pieces).removesuffix("\n")
        blocks.append(f"{_title(units, s)}\n{text}\n{_numbers(statistics(units, s), units.learned)}")
    return "\n\n".join(blocks)


def visible(piece: bytes) -> str:
    """Bytes as text in which everything can be seen."""
    out = []
    for c in piece.decode("utf-8", "surrogateescape"):
        if c in _VISIBLE:
            out.append(_VISIBLE[c])
        elif c.isprintable():
            out.append(c)
        else:
            out += [f"<{b:02X}>" for b in c.encode("utf-8", "surrogateescape")]
    return "".join(out)


def _title(units: Units, s: int) -> str:
    if not units.learned:
        return "Tokens of the tokenizer: the model has no units of its own"
    return f"Units of stage {s}" + (", made of bytes" if s == 0 else f", made of units of stage {s - 1}")


def _numbers(numbers: dict[str, float], learned: bool) -> str:
    what = "unit" if learned else "token"
    plural = "" if numbers["units"] == 1 else "s"
    lines = [f"  {numbers['units']:,.0f} {what}{plural}, {numbers['bytes_per_unit']:.2f} bytes per {what}"]
    if not np.isnan(numbers["at_word_edge"]):
        edges = f"{numbers['at_word_edge']:.0%} begin at the edge of a word"
        lines.append(f"  {edges}, {numbers['at_character_edge']:.0%} with a whole character")
    if not np.isnan(numbers.get("entropy_at_units", np.nan)):
        inside = numbers["entropy_elsewhere"]
        rest = "" if np.isnan(inside) else f", {inside:.2f} within units"
        lines.append(f"  entropy of the next byte: {numbers['entropy_at_units']:.2f} nats where a unit begins{rest}")
    return "\n".join(lines)


def _stage(starts: np.ndarray, begins: np.ndarray) -> Stage:
    """starts: bytes at which units begin, in any order; begins: f32 [n + 1], of which the last is the text's end."""
    n = len(begins) - 1
    bounds = np.unique([0, n, *starts.tolist()]).astype(np.int32)
    return Stage(np.stack([bounds[:-1], bounds[1:]], axis=1), begins[:-1])


def _read(lm: LM, items: Sequence[Item]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Of every stage marks bool [t] and probabilities f32 [t] over all tokens; and entropies f32 [t - 1], of the
    distributions from which tokens 1, 2, ... come."""
    marks: list[Any] = []
    probs: list[Any] = []
    surprise = []
    codec = registry.of(lm.config).codec(lm.config)
    # With a look ahead a window does not decide on its last token: the next one does.
    ahead = _looks_ahead(lm.config)
    for item in items:
        # Padded to few lengths, so that few programs are compiled.
        n = len(item.ids)
        real = np.arange(bucket(n))[None] < n
        out = score.apply(lm, np.pad(item.ids, (0, real.size - n))[None], real)
        # The front token was not to be foreseen, but it may end a unit.
        fresh = slice(item.start - ahead if marks else 0, n if item is items[-1] else n - ahead)
        marks.append([np.asarray(m)[0, fresh] for m in out.aux["boundaries"]])
        probs.append([np.asarray(p)[0, fresh] for p in out.aux["boundary_probs"]])
        logits = codec.merge(out.logits[0, item.start - 1 : n - 1])
        surprise.append(np.asarray(scoring.entropy(jax.nn.log_softmax(logits))))
    join = lambda parts: [np.concatenate(stage) for stage in zip(*parts)]  # noqa: E731
    return join(marks), join(probs), np.concatenate(surprise)


def _looks_ahead(cfg: Any) -> bool:
    return any(rules.looks_ahead(c.rule) for c in cfg.chunking)


def _edges(marks: Sequence[np.ndarray], kinds: Sequence[str]) -> list[np.ndarray]:
    """Per stage, i [t]: the token before which a mark at each token cuts the text. Entries of tokens that are no mark
    of the stage outside mean nothing.

    A mark cuts before the first ("start") or after the last token ("end") of what it marks: a token in stage 0, a
    whole unit of the stage outside in the others.
    """
    t = len(marks[0])
    begin, end = np.arange(t), np.arange(1, t + 1)
    edges = []
    for mark, kind in zip(marks, kinds):
        edge = begin if kind == START else end
        edges.append(edge)
        cuts = np.unique([0, t, *edge[mark].tolist()])
        if kind == START:
            begin, end = edge, cuts[np.minimum(np.searchsorted(cuts, edge, side="right"), len(cuts) - 1)]
        else:
            begin, end = cuts[np.maximum(np.searchsorted(cuts, edge, side="left") - 1, 0)], edge
    return edges


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)] if values.dtype == np.float32 else values
    return float(np.mean(values)) if len(values) else float("nan")
