"""Where published tensors go: the rules that loading and export share."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """Published name -> our path; {i} in the name is `first` + the number of the layer in our stack.

    inputs = 0 keeps the array as it is, with a second axis of length one when unit_axis. Otherwise the published
    matrix is [out, in], and ours its transpose with the first `inputs` axes together being "in" and the rest "out".
    """

    hf: str
    path: str
    inputs: int = 0
    unit_axis: bool = False
    first: int = 0

    def inside(self, hf: str, path: str, first: int = 0) -> Rule:
        """The same rule under prefixes of both names."""
        return dataclasses.replace(self, hf=hf + self.hf, path=path + self.path, first=first)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the published tensor for our shape (without the layer axis)."""
        if self.unit_axis:
            return (shape[0], 1, *shape[1:])
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])) if self.inputs else shape

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """Our array of one layer in its published form."""
        return x.reshape(self.hf_shape(x.shape)[::-1]).T if self.inputs else x.reshape(self.hf_shape(x.shape))

    def from_hf(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The published array in our form (a view)."""
        return (x.T if self.inputs else x).reshape(shape)
