"""Long axes in blocks, for loops that hold one block at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def in_blocks(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """[..., t, ...] with t at `axis`, not negative, to [n, ..., size, ...], n = ceil(t / size), as of `jax.lax.scan`
    and `map`. What the last block lacks are zeros, or by mode "edge" the last entry again."""
    x = jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)], mode=mode)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
