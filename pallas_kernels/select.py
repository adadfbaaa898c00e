"""Rows picked and added up by matrices of zeros and ones, inside a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def select(chosen: jax.Array, x: jax.Array, axis: int, of: int = 0) -> jax.Array:
    """f32 sums of the rows of x (or with of=1 of its columns) that are chosen: bool, whose `axis` counts them.

    Ones and zeros are exact in bfloat16. A float32 row is the sum of three bfloat16 ones, so that three passes of the
    matrix unit are exact where float32 products take six.
    """
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)

    def one(part: jax.Array) -> jax.Array:
        return jax.lax.dot_general(ones, part, (((axis,), (of,)), ((), ())), preferred_element_type=jnp.float32)

    if x.dtype == jnp.bfloat16:
        return one(x)
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    high, middle, low = (one(part) for part in parts)
    return high + (middle + low)
