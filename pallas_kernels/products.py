"""Products of matrices inside a kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Dimension numbers of x y, x y^T and x^T y.
PLAIN, LANES_BOTH, ROWS_BOTH = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def products(dtype: Any) -> Any:
    """dot_general with float32 sums, in full precision for float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
