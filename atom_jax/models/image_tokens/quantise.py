"""From vectors to codes and back: finite scalar quantisation, a learned codebook, or nothing.

Letters: z numbers of a code's vector.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError


@struct.dataclass
class Quantised:
    """z f32 [..., z] as the decoder sees them, with a gradient straight through; index i32 [...] of the codes, None
    where there are none; loss f32 [...], what learning the codebook adds for each."""

    z: jax.Array
    index: jax.Array | None
    loss: jax.Array

    def loss_of(self, keep: jax.Array) -> jax.Array:
        """f32 []: the mean of the loss over codes that are kept, bool [...]."""
        return jnp.sum(self.loss * keep) / jnp.maximum(jnp.sum(keep), 1)


@config.register
@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantisation (Mentzer et al., 2024): every number is squeezed between bounds and rounded.

    levels: values that each number can have; their product is the number of codes. bound: how numbers are squeezed,
    "flextok" as in FlexTok's code, or "elastic" as in ElasticTok's and in the paper's listing; about one code in 80
    differs.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    bound: str = "flextok"

    def __post_init__(self):
        config.check(self, levels=(2, 2**16))
        if not self.levels or math.prod(self.levels) > 2**31 - 1:
            raise AtomError(f"levels: expected at least one, and fewer than 2^31 codes, got {self.levels}")
        if self.bound not in ("flextok", "elastic"):
            raise AtomError(f"bound: expected flextok or elastic, got {self.bound!r}")

    @property
    def width(self) -> int:
        """Numbers of a code's vector."""
        return len(self.levels)

    @property
    def codes(self) -> int:
        """Different codes."""
        return math.prod(self.levels)

    def spec(self) -> Tree:
        """Nothing is learned."""
        return {}

    def __call__(self, p: Tree, z: jax.Array) -> Quantised:
        """p is not used. The numbers of a code are in [-1, 1]."""
        half, bounded = self._half(), self.bounded(z.astype(jnp.float32))
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        digits = jax.lax.stop_gradient(jnp.round(bounded)).astype(jnp.int32) + _like(half, z)
        index = jnp.sum(digits * _like(self._basis(), z), axis=-1, dtype=jnp.int32)
        return Quantised(rounded / _like(half.astype(np.float32), z), index, jnp.zeros(index.shape))

    def vectors(self, p: Tree, index: jax.Array) -> jax.Array:
        """The vectors f32 [..., z] of codes i32 [...]."""
        levels, half = (_like(np.array(x, np.int32), index[..., None]) for x in (self.levels, self._half()))
        return (index[..., None] // _like(self._basis(), index[..., None]) % levels - half) / half.astype(jnp.float32)

    def bounded(self, z: jax.Array) -> jax.Array:
        """Numbers before rounding, f32 [..., z]."""
        levels = np.array(self.levels, np.float64)
        half = (levels - 1) * (1 + (1e-3 if self.bound == "flextok" else -1e-3)) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = (np.arctanh if self.bound == "flextok" else np.tan)(offset / half)
        half, offset, shift = (_like(x.astype(np.float32), z) for x in (half, offset, shift))
        return jnp.tanh(z + shift) * half - offset

    def _half(self) -> np.ndarray:
        return np.array(self.levels, np.int32) // 2

    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)


@config.register
@dataclasses.dataclass(frozen=True)
class VQ:
    """A learned codebook of unit vectors, of which the nearest is taken (van den Oord et al., 2017; with both sides
    normalised as in Yu et al., 2022, and as ALIT and KARL have it).

    commitment: weight of moving vectors towards their codes; codes move towards vectors with weight 1.
    """

    codes: int = 4096
    width: int = 12
    commitment: float = 0.25

    def __post_init__(self):
        config.check(self, codes=(2, 2**24), width=(1, 2**16), commitment=(0, 1e6))

    def spec(self) -> Tree:
        """The codebook."""
        bound = 1 / self.codes
        return {"codebook": ParamSpec((self.codes, self.width), (None, None), normal(bound))}

    def __call__(self, p: Tree, z: jax.Array) -> Quantised:
        """p: as `spec` says."""
        z, book = unit(z.astype(jnp.float32)), unit(p["codebook"].astype(jnp.float32))
        index = jnp.argmax(jnp.einsum("...z,cz->...c", z, book), axis=-1).astype(jnp.int32)
        found, stop = jnp.take(book, index, axis=0), jax.lax.stop_gradient
        to_code, to_vector = (jnp.mean(jnp.square(x), axis=-1) for x in (stop(found) - z, found - stop(z)))
        loss = self.commitment * to_code + to_vector
        return Quantised(z + stop(found - z), index, loss)

    def vectors(self, p: Tree, index: jax.Array) -> jax.Array:
        """The vectors f32 [..., z] of codes i32 [...]."""
        return jnp.take(unit(p["codebook"].astype(jnp.float32)), index, axis=0)


@config.register
@dataclasses.dataclass(frozen=True)
class Continuous:
    """No codes: vectors as they are."""

    width: int = 8

    codes: ClassVar[int] = 0

    def __post_init__(self):
        config.check(self, width=(1, 2**16))

    def spec(self) -> Tree:
        """Nothing is learned."""
        return {}

    def __call__(self, p: Tree, z: jax.Array) -> Quantised:
        """p is not used."""
        return Quantised(z.astype(jnp.float32), None, jnp.zeros(z.shape[:-1]))


QUANTISERS = (FSQ, VQ, Continuous)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length one; zeros stay, with a gradient of zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _like(values: Any, x: jax.Array) -> jax.Array:
    """Constants of the last axis of x, with as many axes."""
    return jnp.asarray(values).reshape((1,) * (x.ndim - 1) + (-1,))
