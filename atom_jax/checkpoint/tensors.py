"""What conversion reads from: named tensors that are fetched one at a time, wherever they are stored."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

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
