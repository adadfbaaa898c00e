"""Rows that are decoded together, while texts join and leave: what every loop over a fixed number of rows is made of.

Rows that are added, and buffers that grow, do so in few sizes, which compile once each. What is made in a row depends
on what it has read, on its key and on how it chooses: not on the number of rows, and not on what the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from atom_jax.session.decode import Made
from atom_jax.session.slots import Slots

T = TypeVar("T")


class Lane(Generic[T]):
    """Rows that one thread decodes together. owners: of every row whose it is, None where it is free. slots: None
    before the first has joined."""

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self.owners: list[T | None] = []

    @property
    def live(self) -> list[int]:
        """Rows that belong to somebody."""
        return [r for r, owner in enumerate(self.owners) if owner is not None]

    @property
    def free(self) -> list[int]:
        """Rows that belong to nobody."""
        return [r for r, owner in enumerate(self.owners) if owner is None]

    def join(self, new: Slots, owners: Sequence[T]) -> None:
        """Gives rows to these: those of `new`, in order, of which further ones are left out. The lane gets twice as
        many rows as often as is needed."""
        if self.slots is None:
            self.slots, self.owners = new, [*owners, *[None] * (len(new.first) - len(owners))]
            return
        while len(self.free) < len(owners):
            n = len(self.owners)
            self._choose([*range(n), *range(n)])
            self.owners[n:] = [None] * n
            self.slots.clear(range(n, 2 * n))
        at = self.free[: len(owners)]
        # Places beyond the rows take what is too many.
        self.slots.put([*at, *[len(self.owners)] * (len(new.first) - len(owners))], new)
        for r, owner in zip(at, owners):
            self.owners[r] = owner

    def halve(self) -> None:
        """Leaves out free rows until there are half as many, which is a compilation of half the size."""
        self._choose([*self.live, *self.free][: len(self.owners) // 2])

    def decode(self, look: int, most_b: Sequence[int] | int) -> tuple[np.ndarray, Made]:
        """Makes `look` further tokens in every row that has an owner and no end, up to `most_b` of each. How many
        there are of each row, i32 [b], and what they are."""
        made = self.slots.made
        owned = np.array([owner is not None for owner in self.owners])
        until = np.where(owned, np.minimum(made + look, most_b), 0)
        self.slots.prepare(until)
        out = self.slots.decode(until)
        return self.slots.made - made, out

    def _choose(self, rows: list[int]) -> None:
        self.slots, self.owners = self.slots.rows(rows), [self.owners[r] for r in rows]
