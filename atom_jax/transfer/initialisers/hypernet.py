"""Rows made by a trained hypernetwork (`transfer.hypernet`)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.transfer.hypernet import surfaces
from atom_jax.transfer.initialisers.base import Initialiser, Task
from atom_jax.transfer.initialisers.fvt import decompose
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class FromHypernet(Initialiser):
    """path: where the network is: the WORKDIR of a run that trained it, a directory that `checkpoint.hypernets.save`
    wrote, or one of zett's. Without, `Aux.hypernet`. copies: tokens that both vocabularies share keep their rows."""

    name: ClassVar[str] = "hypernet"
    needs: ClassVar[tuple[str, ...]] = ("hypernet",)
    path: str = ""

    def __post_init__(self):
        config.check(self)

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser. Raises AtomError for a network of another table."""
        (found,) = task.need(*self.needs)
        net, p = found
        if (net.n, net.d) != task.table.shape[1:]:
            raise AtomError(
                f"hypernet: made for {net.n} tables of width {net.d}, this model has {list(task.table.shape[1:])}"
            )
        cuts = decompose(task.source, task.target, task.new, len(task.table))
        surface, real = surfaces(cuts, net.length)
        return net.rows(p, task.table, surface, real), real[:, 0]
