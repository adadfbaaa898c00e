"""Corrections of low rank to matrices: W + A B in place of W (Hu et al., 2021, "LoRA", section 4.1).

Learned memory corrects the projections of attention by them, tuning all projections (`models.lora`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.params import ParamSpec, Tree, normal, zeros

# Leading axes of each projection that are its inputs.
ATTENTION = {"q": 1, "k": 1, "v": 1, "o": 2}
MLP = {"gate": 1, "up": 1, "down": 1}


@struct.dataclass
class Corrected:
    """A matrix w [in..., out...] that acts as w + a b (a [in..., r], b [r, out...]) and is left as it is: `project`
    computes both products, so that w needs no gradient."""

    w: jax.Array
    a: jax.Array
    b: jax.Array


def spec(matrices: Tree, inputs: Mapping[str, int], rank: int) -> Tree:
    """ParamSpecs "q_a" [..., rank] and "q_b" [rank, ...], and so on, for the ParamSpecs of matrices, each with so
    many leading axes of inputs; a new correction is zero."""
    out = {}
    for name, count in inputs.items():
        whole = matrices[name]
        first, last = whole.shape[:count], whole.shape[count:]
        out[f"{name}_a"] = ParamSpec((*first, rank), (*whole.axes[:count], None), normal(math.prod(first) ** -0.5))
        out[f"{name}_b"] = ParamSpec((rank, *last), (None, *whole.axes[count:]), zeros)
    return out


def added(w: jax.Array | Corrected, a: jax.Array, b: jax.Array) -> jax.Array | Corrected:
    """w + a b in the dtype of w, which may be corrected already."""
    if isinstance(w, Corrected):
        return w.replace(w=added(w.w, a, b))
    return w + jnp.tensordot(a, b, 1).astype(w.dtype)
