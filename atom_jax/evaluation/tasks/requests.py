"""Reads request files into records, and refuses files that aren't laid out as expected.

A line of a file is one continuation of one document. In "doubled" files each document appears a second time, under
its number plus UNCONDITIONAL, with the same continuations after a neutral context ("Answer:"). That half measures how
likely each answer is by itself; counted as documents of its own it would make every accuracy wrong.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from atom_jax import config
from atom_jax.data.fetch import evaldata
from atom_jax.files import open_regular
from atom_jax.typing import AtomError

UNCONDITIONAL = 1_000_000


@dataclasses.dataclass(frozen=True)
class Request:
    """One document.

    contexts, continuations: one of each per choice; the contexts are equal, except in WinoGrande.
    gold: index of the right choice; 0 where there is only one.
    neutral: the neutral context of a doubled file, or None.
    """

    document: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    neutral: str | None = None


def read(file: str) -> list[Request]:
    """The documents of an entry of `evaldata.FILES`, in order. Raises AtomError if missing, damaged or unexpected."""
    return read_file(evaldata.path(file), evaldata.FILES[file])


def read_file(path: pathlib.Path, layout: evaldata.Layout) -> list[Request]:
    """The documents of one request file. Raises AtomError naming the file and the document that isn't as expected."""
    halves: tuple[dict[int, list[dict]], ...] = ({}, {})
    for row in _rows(path):
        second, document = divmod(row["doc_id"], UNCONDITIONAL)
        if second not in (0, 1):
            raise AtomError(f"{path}: document number {row['doc_id']} is out of range")
        choices = halves[second].setdefault(document, [])
        if row["idx"] != len(choices):
            raise AtomError(f"{path}, document {row['doc_id']}: choice {row['idx']} where {len(choices)} is due")
        choices.append(row)
    main, neutral = halves
    if sorted(main) != list(range(layout.documents)):
        raise AtomError(f"{path}: expected documents 0 to {layout.documents - 1}, found {len(main)} others")
    if set(neutral) != (set(main) if layout.doubled else set()):
        expected = layout.documents if layout.doubled else 0
        raise AtomError(f"{path}: expected {expected} documents with a neutral context, found {len(neutral)}")
    return [_request(path, document, main[document], neutral.get(document)) for document in sorted(main)]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Settings of tasks with documents. limit: documents to draw at random with `seed` (0: all)."""

    limit: int = 0
    seed: int = 0

    def __post_init__(self):
        count = (0, 2**31 - 1)
        config.check(self, limit=count, seed=count)


def subset(n: int, limit: int, seed: int) -> list[int]:
    """Numbers below n in order: all of them (limit 0), or `limit` drawn at random without repetition."""
    if not 0 < limit < n:
        return list(range(n))
    return sorted(np.random.default_rng(seed).permutation(n)[:limit].tolist())


def _rows(path: pathlib.Path) -> list[dict]:
    rows = []
    try:
        with open_regular(path) as raw, gzip.open(raw, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                row = json.loads(line)
                request = row["request"]
                kinds = (row["doc_id"], row["idx"], request["context"], request["continuation"], row["label"])
                if tuple(map(type, kinds[:4])) != (int, int, str, str) or not request["continuation"]:
                    raise AtomError(f"{path}, line {number}: a field of the request has the wrong type")
                rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise AtomError(f"{path} is damaged ({e}): run `make evaldata` again") from None
    except (KeyError, TypeError) as e:
        raise AtomError(f"{path}, line {len(rows) + 1}: not a request ({e})") from None
    return rows


def _request(path: pathlib.Path, document: int, rows: Sequence[dict], neutral: Sequence[dict] | None) -> Request:
    contexts = tuple(r["request"]["context"] for r in rows)
    continuations = tuple(r["request"]["continuation"] for r in rows)
    gold = rows[0]["label"] if len(rows) > 1 else 0
    if len(rows) > 1 and any(r["label"] != gold for r in rows):
        raise AtomError(f"{path}, document {document}: its choices disagree about the right one")
    if type(gold) is not int or not 0 <= gold < len(rows):
        raise AtomError(f"{path}, document {document}: label {gold!r} is none of its {len(rows)} choices")
    if neutral is None:
        return Request(document, contexts, continuations, gold)
    found = {r["request"]["context"] for r in neutral}
    same = tuple(r["request"]["continuation"] for r in neutral) == continuations
    if not same or len(found) != 1 or found & {*contexts}:
        raise AtomError(
            f"{path}, document {document}: its second copy isn't the same answers after a neutral context"
        )
    return Request(document, contexts, continuations, gold, found.pop())
