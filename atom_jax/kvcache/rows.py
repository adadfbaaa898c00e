"""Rows of one state in the places of another's."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def put_rows(x: Any, y: Any, index_b: np.ndarray, axis: int, free: dict[str, float] | None = None) -> Any:
    """Trees of arrays in which rows are those of others; the larger sizes remain. free: what pads them, by name."""

    index = jnp.asarray(index_b, jnp.int32)

    def one(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        fill = free.get(path[0].name, 0) if free else 0
        return _placed(a, b, index, axis, fill)

    return jax.tree_util.tree_map_with_path(one, x, y)


@functools.partial(jax.jit, static_argnames=("axis", "fill"), donate_argnums=0)
def _placed(x: jax.Array, y: jax.Array, index_b: jax.Array, axis: int, fill: float) -> jax.Array:
    shape = [max(sizes) for sizes in zip(x.shape, y.shape)]

    def wide(a: jax.Array) -> jax.Array:
        widths = [(0, 0 if i == axis else m - n) for i, (m, n) in enumerate(zip(shape, a.shape))]
        return jnp.pad(a, widths, constant_values=jnp.asarray(fill, a.dtype)) if any(m for _, m in widths) else a

    x, y = wide(x), wide(y)
    return x.at[(slice(None),) * axis + (index_b,)].set(y, mode="drop")
