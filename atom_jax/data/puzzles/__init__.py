"""Problems that a program can pose, reason about and check, without end: sources of text, and tests of reasoning.

A new one is one file and one entry of `PUZZLES`.
"""

from __future__ import annotations

from atom_jax import config
from atom_jax.data.puzzles.puzzle import Generated, Puzzle
from atom_jax.data.puzzles.subset import Subset
from atom_jax.typing import AtomError

__all__ = ["PUZZLES", "Generated", "Puzzle", "Subset", "parse"]

PUZZLES: dict[str, type[Puzzle]] = {puzzle.name: puzzle for puzzle in (Subset,)}


def parse(text: str) -> Puzzle:
    """The puzzle that a text such as "subset:least=3:letters=6" names.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    name, *fields = text.split(":")
    if name not in PUZZLES:
        raise AtomError(f"reason:{name}: expected one of {', '.join(PUZZLES)}")
    return config.build(PUZZLES[name], fields, f"reason:{name}:")
