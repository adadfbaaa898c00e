"""What families count their operations with, from the sizes of products (`Kind.flops`)."""

from __future__ import annotations

import math

from atom_jax import params
from atom_jax.params import Tree


def keys(length: int, window: int) -> float:
    """Keys that a query sees, on average over a row."""
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def matrices(spec: Tree) -> int:
    """Scalars in the matrices of a spec tree, all layers together."""
    flat = params.flatten(spec)
    return sum(math.prod(s.shape) for s in flat.values() if sum(a != "layers" for a in s.axes) >= 2)
