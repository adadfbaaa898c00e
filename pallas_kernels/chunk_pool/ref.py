"""What `chunk_pool` means."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Row b, entry i of the result is x[b, index[b, i]].

    Args: x [b, n, ...]; index i32 [b, i], within [0, n).
    Returns: [b, i, ...] in the dtype of x.
    """
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def segment_sum(x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Sums of the entries of x [b, t, ...] with equal ids i32 [b, t], which never decrease along t: [b, n, ...];
    ids from n on count nowhere."""
    one_row = functools.partial(jax.ops.segment_sum, num_segments=n, indices_are_sorted=True)
    return jax.vmap(one_row)(x, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def segment_max(x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Largest entries of x [b, t, ...] with equal ids i32 [b, t], which never decrease along t: [b, n, ...], and
    -inf where there are none; ids from n on count nowhere. Entries that tie share the gradient evenly, as in
    `jnp.max`."""
    one_row = functools.partial(jax.ops.segment_max, num_segments=n, indices_are_sorted=True)
    return jax.vmap(one_row)(x, ids)


def _segment_max_forward(x, ids, n):
    top = segment_max(x, ids, n)
    return top, (x, ids, top)


def _segment_max_backward(n, saved, g):
    x, ids, top = saved
    own = jnp.minimum(ids, n - 1)
    among = (ids < n).reshape(*ids.shape, *[1] * (x.ndim - 2))
    tied = ((x == gather(top, own)) & among).astype(jnp.float32)
    share = g.astype(jnp.float32) / jnp.maximum(segment_sum(tied, ids, n), 1.0)
    return (tied * gather(share, own)).astype(x.dtype), None


segment_max.defvjp(_segment_max_forward, _segment_max_backward)
