"""Ways to make the embedding of a new vocabulary, by name, and how they are written on a command line: "omp:k=32"."""

from __future__ import annotations

from atom_jax import config
from atom_jax.transfer.initialisers.base import Aux, Initialiser, Task
from atom_jax.transfer.initialisers.fallback import Covariance, Mean, Normal, Zero
from atom_jax.transfer.initialisers.focus import Focus
from atom_jax.transfer.initialisers.fvt import FVT
from atom_jax.transfer.initialisers.hypernet import FromHypernet
from atom_jax.transfer.initialisers.landmarks import Landmarks
from atom_jax.transfer.initialisers.neighbours import Neighbours
from atom_jax.transfer.initialisers.omp import OMP
from atom_jax.transfer.initialisers.tokenadapt import TokenAdapt
from atom_jax.transfer.initialisers.wechsel import Wechsel

__all__ = ["FVT", "INITIALISERS", "Aux", "FromHypernet", "Initialiser", "Normal", "Task", "Zero", "parse"]

INITIALISERS: dict[str, type[Initialiser]] = {
    cls.name: cls
    for cls in (
        FVT,
        OMP,
        Neighbours,
        Landmarks,
        Focus,
        Wechsel,
        TokenAdapt,
        FromHypernet,
        Normal,
        Covariance,
        Mean,
        Zero,
    )
}


def parse(text: str, flag: str = "method") -> Initialiser:
    """The method that a text such as "omp:k=32" names. Raises AtomError as of `config.named`."""
    return config.named(text, INITIALISERS, flag)
