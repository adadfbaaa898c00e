"""Dense projections."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from atom_jax.nn.low_rank import Corrected


def project(x: jax.Array, w: jax.Array | Corrected, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first `inputs` axes of w; result in the dtype of x. Of a
    corrected w the correction's two products are added.

    On one device computed as one product of two matrices: with the leading axes kept apart, XLA's CPU backend takes
    about twice as long for the gradients. On several, leading axes that are spread over devices must stay apart.
    """
    if isinstance(w, Corrected):
        return project(x, w.w, inputs) + project(project(x, w.a, inputs), w.b)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.tensordot(x, w.astype(x.dtype), inputs)
    rows, columns = x.shape[: x.ndim - inputs], w.shape[inputs:]
    contracted = math.prod(w.shape[:inputs])
    y = x.reshape(-1, contracted) @ w.reshape(contracted, -1).astype(x.dtype)
    return y.reshape(*rows, *columns)
