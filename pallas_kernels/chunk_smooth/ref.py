"""What `chunk_smooth` means."""

from __future__ import annotations

import jax


def linear_scan(a_bm1: jax.Array, x_bmd: jax.Array, reverse: bool = False) -> jax.Array:
    """y_j = a_j y_{j-1} + x_j along axis 1 (y_{j+1} when reversed), from zero: a [b, m, 1], x [b, m, d]."""

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(combine, (a_bm1, x_bmd), reverse=reverse, axis=1)[1]
