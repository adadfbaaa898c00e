"""Reads JSON files and their fields with complaints that name the file and the field."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import regex
from absl import logging

from atom_jax.files import read_regular
from atom_jax.typing import AtomError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; AtomError naming the file where there is none."""
    try:
        value = json.loads(read_regular(path))
    except OSError as e:
        raise AtomError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise AtomError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise AtomError(f"{path}: not a JSON object")
    return value


def meant(name: str, known: Iterable[str]) -> str:
    """What follows a name that is unknown: " (did you mean ...?)", or "" where none that is known is like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


class Expression:
    """A regular expression that somebody else wrote. Raises AtomError, which begins with `where`, for a text that is
    none, and, when it is used, for one that takes longer than SECONDS."""

    SECONDS = 10

    def __init__(self, text: str, where: str):
        self._where = f"{where}: {text[:80]!r}"
        try:
            self._known = regex.compile(text)
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as e:
            raise AtomError(f"{self._where} is not a regular expression ({e})") from None

    def matches(self, text: str) -> bool:
        """Whether it matches the whole text."""
        with self._limited():
            return self._known.fullmatch(text, timeout=self.SECONDS) is not None

    def last(self, text: str) -> str | None:
        """The last match in a text, of its first group, where it has one; None where there is none."""
        with self._limited():
            *_, found = None, *self._known.finditer(text, timeout=self.SECONDS)
        return None if found is None else found.group(1 if self._known.groups else 0)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise AtomError(f"{self._where} takes more than {self.SECONDS} seconds to be found") from None


class Fields:
    """Typed access to the fields of a config.json; every complaint names the file and the field."""

    def __init__(self, data: dict[str, Any], where: str):
        self.data, self.where = data, where

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number in [least, most]. A missing or null field takes the default, if there is one."""
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number, by default a positive one."""
        value = self._get(name, default)
        least = 0 if positive else -1e30
        if type(value) not in (int, float) or not least < value < 1e30 or not math.isfinite(value):
            raise self._wrong(name, value, "a positive number" if positive else "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def one_of(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of some words."""
        value = self._get(name, default)
        if value not in choices:
            raise self._wrong(name, value, " or ".join(choices))
        return value

    def ids(self, name: str, vocab: int) -> tuple[int, ...]:
        """One token id, a list of them, or none. Ids outside the vocabulary (some files say -1) are dropped."""
        value = self.data.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in ids):
            raise self._wrong(name, value, "a token id or a list of them")
        inside = tuple(i for i in ids if 0 <= i < vocab)
        if len(inside) < len(ids):
            logging.warning("%s: ignored %s outside the vocabulary of %d", self.where, name, vocab)
        return inside

    def table(self, *names: str) -> Fields:
        """The object under a chain of names; empty where it is missing or null."""
        value: Any = self.data
        for name in names:
            value = {} if value.get(name) is None else value[name]
            if not isinstance(value, dict):
                raise self._wrong(name, value, "an object")
        return Fields(value, self.where)

    def _wrong(self, name: str, value: Any, expected: str) -> AtomError:
        return AtomError(f"{self.where}: {name} is {str(value)[:60]}; it must be {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is None and default is None:
            raise AtomError(f"{self.where}: the field {name} is missing")
        return default if value is None else value
