"""Parameters as nested dictionaries of arrays, described by a tree of `ParamSpec` of the same shape.

One description yields initial values, abstract shapes and (with `sharding`) placements.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Tree = Any


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical name (or None) for every axis, how it starts, and its dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def normal(stddev: float) -> Initializer:
    """Independent normal values with the given standard deviation, cut at three deviations."""
    return lambda key, shape, dtype: stddev * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)


def constant(value: float) -> Initializer:
    """Every element equal to `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


zeros = constant(0.0)
ones = constant(1.0)


def is_spec(leaf: Any) -> bool:
    """True for a ParamSpec: the `is_leaf` of spec trees."""
    return isinstance(leaf, ParamSpec)


def map_specs(fn: Callable[..., Any], spec: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over the ParamSpec leaves of a spec tree."""
    return jax.tree.map(fn, spec, *rest, is_leaf=is_spec)


def init(key: jax.Array, spec: Tree, dtype: Any = None) -> Tree:
    """Draws initial values. Every leaf's key depends only on `key` and the leaf's path, so adding a parameter
    leaves the others unchanged; values do not depend on how the result is sharded."""

    def leaf(path: Any, s: ParamSpec) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return s.init(jax.random.fold_in(key, zlib.crc32(name.encode())), s.shape, dtype or s.dtype)

    return jax.tree_util.tree_map_with_path(leaf, spec, is_leaf=is_spec)


def abstract(spec: Tree, dtype: Any = None, shardings: Tree | None = None) -> Tree:
    """The tree of jax.ShapeDtypeStruct, optionally with shardings, that `init` would fill."""
    if shardings is None:
        return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype), spec)
    return map_specs(lambda s, sh: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sh), spec, shardings)


def stack(spec: Tree, n: int, axis: str = "layers") -> Tree:
    """Describes `n` independent copies stacked on a new leading axis, for `jax.lax.scan`."""
    return map_specs(lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(axis, *s.axes)), spec)


def count(spec: Tree) -> int:
    """Number of scalars in a spec tree or in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(spec, is_leaf=is_spec))


def nbytes(tree: Tree) -> int:
    """Bytes held by a tree of arrays (or ShapeDtypeStructs)."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def flatten(tree: Tree) -> dict[str, Any]:
    """{"layers/attn/q": leaf} in a fixed order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def unflatten(leaves: dict[str, Any] | Iterable[tuple[str, Any]]) -> Tree:
    """The inverse of `flatten` for nested dictionaries."""
    out: dict[str, Any] = {}
    for path, leaf in dict(leaves).items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out


def cast(tree: Tree, dtype: Any) -> Tree:
    """Casts the floating-point leaves."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def unstack(tree: Tree) -> tuple:
    """A tuple of trees, one for each entry of the leading axis that all arrays of `tree` share."""
    return tuple(_pick(tree, i) for i in range(jax.tree.leaves(tree)[0].shape[0]))


def apart(tree: Tree) -> tuple:
    """As `unstack`, of arrays on one CPU device. Where an entry begins at a multiple of 64 bytes, its array is a
    part of the same memory, which lasts as long as any of them, and no program is given it before; others are copies.
    """
    leaves, form = jax.tree.flatten(tree)
    entries = [jax.device_put(list(np.asarray(x)), _place(x)) for x in leaves]
    return tuple(jax.tree.unflatten(form, entry) for entry in zip(*entries, strict=True))


def _place(x: Any) -> Any:
    """The device of an array that is bound to one; None: of an array that is not."""
    return next(iter(x.devices())) if isinstance(x, jax.Array) and x.committed else None


@jax.jit
def _pick(tree: Tree, i: int) -> Tree:
    return jax.tree.map(lambda x: x[i], tree)
