"""What a user gives a memory to read and is told of it, and token ids as files hold them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atom_jax.files import read_regular
from atom_jax.lasting.store import Source
from atom_jax.typing import AtomError

_LONGEST = 4096  # characters of a path


class Reading(NamedTuple):
    """What `Memory.read` did. tokens: that it read; nll: nats of each. entries_before, entries_after: per head.
    bytes: of all files."""

    name: str
    tokens: int
    nll: float
    entries_before: int
    entries_after: int
    bytes: int
    seconds: float


class Page(NamedTuple):
    """Part of a text that a prompt looks at. source: its name; first, last: tokens of it; weight: their share of the
    attention that all entries receive; text: what they say, where ids are kept. of: what first and last count: of a
    model with units of its own "units" where ids aren't kept."""

    source: str
    first: int
    last: int
    weight: float
    text: str | None
    of: str = "tokens"


def page(
    source: Source, ids: np.ndarray, ends: np.ndarray, first: int, last: int, weight: float, tokenizer: Any
) -> Page:  # fmt: skip
    """The page of a source from one token (or unit) to another, which may be behind its end. ids, ends: as the memory
    has them. tokenizer: None: there is none."""
    if source.units and not source.text:
        return Page(source.name, first, min(last, source.units - 1), weight, None, "units")
    if source.units:
        first, last = int(np.append(0, ends)[first]), int(ends[min(last, source.units - 1)]) - 1
    last, text = min(last, source.tokens - 1), None
    if source.text and tokenizer is not None:
        text = tokenizer.decode(ids[first : last + 1].tolist())
    return Page(source.name, first, last, weight, text)


class Content(NamedTuple):
    """data: as `session.prompts.token_rows` takes it. raw: its bytes; None for ids. label: a name for it, or None."""

    data: Any
    raw: bytes | None
    label: str | None


def content(text: Any) -> Content:
    """What a path, or a string that is one of a file, another string, bytes, or ids hold. AtomError for a file that
    can't be read."""
    if isinstance(text, os.PathLike) or (isinstance(text, str) and _is_file(text)):
        try:
            data = read_regular(text)
        except OSError as e:
            raise AtomError(f"{text}: cannot be read ({e.strerror})") from None
        if not data:
            raise AtomError(f"{text}: is empty")
        return Content(data, data, Path(text).name)
    if isinstance(text, str | bytes):
        return Content(text, text.encode() if isinstance(text, str) else text, None)
    return Content(text, None, None)


def _is_file(text: str) -> bool:
    try:
        return len(text) < _LONGEST and Path(text).is_file()
    except (OSError, ValueError):
        return False


def packed(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids as u8 [n, 2], or [n, 4] where two bytes are too few; the lowest comes first."""
    width = 2 if vocab_size <= 1 << 16 else 4
    return np.ascontiguousarray(ids).astype(f"<u{width}").view(np.uint8).reshape(-1, width)


def arrays(
    text: str, ids: np.ndarray, ends: list[np.ndarray] | None, vocab_size: int
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """What a file "text" holds of ids, and of the token behind each unit (None: there are none), by the setting
    `text`."""
    units = {} if ends is None else {"ends": np.concatenate([np.zeros(0, np.int32), *ends])}
    return {"text": {"ids": packed(ids, vocab_size)} | units} if text == "ids" else {}


def unpacked(bytes_nw: np.ndarray) -> np.ndarray:
    """Ids i32 [n] of what `packed` made."""
    return bytes_nw.view(f"<u{bytes_nw.shape[1]}")[:, 0].astype(np.int32)
