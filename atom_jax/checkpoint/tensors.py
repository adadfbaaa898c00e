"""Named tensors: what conversion fetches one at a time, wherever they are stored; are they those that are wanted?"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import numpy as np

from atom_jax import params as params_lib
from atom_jax.params import Tree
from atom_jax.typing import AtomError

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors of one checkpoint. `label` names the checkpoint in messages."""

    label: str
    infos: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, of the shape and dtype in `infos[name]`."""
        ...


def check_finite(x: np.ndarray, label: str, name: str) -> np.ndarray:
    """Returns x; raises AtomError naming the tensor where a floating-point x holds NaN or infinity."""
    if x.dtype.kind in "biu":
        return x
    flat = x.reshape(-1)
    # In pieces, so that the check of a large embedding costs megabytes rather than another quarter of it.
    for start in range(0, flat.size, _CHUNK):
        if not np.isfinite(flat[start : start + _CHUNK]).all():
            raise AtomError(f"{label}: tensor '{name}' holds NaN or infinite values")
    return x


def compare(wanted: Tree, found: Tree, where: str, check_dtype: bool = True) -> None:
    """Raises AtomError for the first tensor that is missing, left over, or of another shape or dtype."""
    a, b = _by_name(wanted), _by_name(found)
    for name in sorted(set(a) ^ set(b)):
        raise AtomError(f"{where}: {name} is {'missing' if name in a else 'not part of this model'}")
    for name, leaf in a.items():
        other = b[name]
        if tuple(leaf.shape) != tuple(other.shape) or (check_dtype and leaf.dtype != other.dtype):
            raise AtomError(
                f"{where}: {name} is {other.dtype}{list(other.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            )


def _by_name(tree: Tree) -> dict[str, Any]:
    return params_lib.flatten(jax.tree.map(lambda x: x, tree))
