"""Corrections of low rank to the projections of attention: a model learns to read a memory that keys have left.

W + A B in place of W (Hu et al., 2021, "LoRA", section 4.1), wherever keys may be evicted; with eviction off the
model is what it was, so that one copy of the weights still serves as its own teacher.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from atom_jax.params import ParamSpec, Tree, normal, zeros

# Leading axes of each projection that are its inputs.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2}


def spec(projections: Tree, rank: int) -> Tree:
    """ParamSpecs "q_a" [..., rank] and "q_b" [rank, ...], and so on, for the ParamSpecs of an attention layer; a new
    correction is zero."""
    out = {}
    for name, inputs in INPUTS.items():
        whole = projections[name]
        first, last = whole.shape[:inputs], whole.shape[inputs:]
        out[f"{name}_a"] = ParamSpec((*first, rank), (*whole.axes[:inputs], None), normal(math.prod(first) ** -0.5))
        out[f"{name}_b"] = ParamSpec((rank, *last), (None, *whole.axes[inputs:]), zeros)
    return out


def corrected(p: Tree) -> Tree:
    """The parameters of an attention layer with the corrections under "dms" added, and no longer there."""
    dms = dict(p["dms"])
    new = {
        name: p[name] + jnp.tensordot(dms.pop(f"{name}_a"), dms.pop(f"{name}_b"), 1).astype(p[name].dtype)
        for name in INPUTS
        if f"{name}_a" in dms
    }
    return {**p, **new, "dms": dms}
