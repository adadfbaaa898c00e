"""The state of a run on the devices, and where every part of it lives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.params import Tree
from atom_jax.training.optim import Optimizer


@struct.dataclass
class State:
    """Everything that a step changes.

    step:   i32 [], steps done.
    params: all parameters.
    opt:    optimiser state of the parameters that learn.
    ema:    moving average of the parameters that learn, or None.
    bad:    i32 [], steps in a row, up to now, that were skipped because a gradient was not finite.
    """

    step: jax.Array
    params: Tree
    opt: Any
    ema: Tree | None
    bad: jax.Array


def fresh(params: Tree, optimizer: Optimizer, ema: bool) -> State:
    """The state before the first step."""
    learn, _ = optimizer.split(params)
    # The average starts as a copy: donated buffers must not be shared.
    average = jax.tree.map(jnp.copy, learn) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return State(step=zero, params=params, opt=optimizer.transform.init(learn), ema=average, bad=jnp.copy(zero))


def abstract(spec: Tree, optimizer: Optimizer, ema: bool, mesh: Mesh) -> State:
    """The state as ShapeDtypeStructs with shardings: moments lie where their parameters lie."""
    placed = params_lib.abstract(spec, shardings=sharding.shardings(spec, mesh))
    state = jax.eval_shape(lambda p: fresh(p, optimizer, ema), placed)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, _places(state, placed, mesh)
    )


def shardings(state: State) -> State:
    """The shardings of an abstract state, for `jax.jit`."""
    return jax.tree.map(lambda s: s.sharding, state)


def to_trees(state: State, extra: tuple[str, ...]) -> dict[str, Any]:
    """The parts of a state that a checkpoint keeps apart, so that the model's parameters can be read alone; extra:
    names of the others."""
    trees = {"params": {k: v for k, v in state.params.items() if k not in extra}}
    trees |= {"opt": {"opt": state.opt, "step": state.step, "bad": state.bad}}
    trees |= {"ema": state.ema} if state.ema is not None else {}
    return trees | {name: state.params[name] for name in extra}


def from_trees(trees: dict[str, Any], extra: tuple[str, ...]) -> State:
    """The inverse of `to_trees`."""
    params = trees["params"] | {name: trees[name] for name in extra}
    return State(params=params, ema=trees.get("ema"), **trees["opt"])


def _places(state: State, params: Tree, mesh: Mesh) -> State:
    """A sharding for every leaf: that of the parameter whose path ends its own and whose shape it has, else none."""
    known = params_lib.flatten(params)

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        hits = [k for k, p in known.items() if name.endswith("/" + k) and p.shape == leaf.shape]
        return known[max(hits, key=len)].sharding if hits else NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state)
