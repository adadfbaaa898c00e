"""Damaged copies of small valid files, and a limit on the work that reading one may take."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

from atom_jax.typing import AtomError

# Mutants per reader: seconds in the suite; `make soak` asks for more.
COUNT = int(os.environ.get("ATOM_SOAK") or 60)
# Function calls, of Python and of C, that reading a small file may take. Honest ones take a tenth.
MOST_CALLS = 3_000_000
ODD = [
    None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**63, 10**30, -(10**30), 1e308, 5e-324, float("nan"), float("inf"), 0.5,
    "", "x" * 5000, "\u0000", "1", "../..", [], [[]], [0], ["a", 1], {}, {"a": {}}, {"class": "DMS"},
]  # fmt: skip


class TooMuchWork(BaseException):
    """More calls than a reader of a small file has any use for."""


@contextlib.contextmanager
def bounded_work(most: int = MOST_CALLS) -> Iterator[None]:
    """Raises TooMuchWork after so many function calls: a bound that does not depend on the machine."""
    left = most

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise TooMuchWork

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def damaged(raw: bytes, rng: random.Random, head: int = 0) -> bytes:
    """A copy with some bits flipped, a number overwritten, a part left out or repeated, or the end cut off.

    head: where most of the damage is done, in bytes from the beginning; 0: anywhere."""
    out, reach = bytearray(raw), min(head or len(raw), len(raw))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(max(1, reach))
        match rng.randrange(5):
            case 0:
                del out[rng.randrange(len(out) + 1) :]
            case 1:
                width, value = rng.choice(
                    [(4, 2**32 - 1), (4, 0), (8, 2**63), (8, 2**40), (8, 10**6), (8, 2**64 - 1)]
                )
                out[at : at + width] = struct.pack("<I" if width == 4 else "<Q", value)
            case 2:
                out[at:at] = out[at : at + rng.randrange(1, 40)]
            case 3:
                del out[at : at + rng.randrange(1, 40)]
            case _:
                for _ in range(rng.randrange(1, 9)):
                    where = rng.randrange(max(1, min(reach, len(out))))
                    if out:
                        out[where] ^= 1 << rng.randrange(8)
        if not out:
            break
    return bytes(out)


def twisted(tree: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one or two places hold something else, are missing, or are there twice."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2])):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(["extra", "", "class", key + "_"])] = parent[key]
            case 2 if isinstance(parent, list):
                parent.insert(key, parent[key])
            case 3:
                other, there = rng.choice(places)
                parent[key] = copy.deepcopy(other[there]) if other is not parent or there != key else [other[there]]
            case _:
                parent[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        # Of the long lists of a vocabulary a few entries are as good as all.
        if not isinstance(tree, list) or key < 20:
            yield from _places(value)


def json_mutants(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file damaged as a value three times out of four, as bytes otherwise."""
    if rng.randrange(4):
        return json.dumps(twisted(json.loads(raw), rng)).encode()
    return damaged(raw, rng)


def survives(read: Callable[[], Any], what: str) -> bool:
    """Whether reading succeeds; an AtomError of one short sentence is the only way in which it may fail."""
    try:
        with bounded_work():
            read()
    except AtomError as e:
        text = str(e)
        assert 0 < len(text) < 300 and "Traceback" not in text, (what, text)
        return False
    except BaseException as e:
        raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    return True
