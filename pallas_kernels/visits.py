"""Which tiles meet, where indices never decrease: a staircase of at most (tiles of one kind + tiles of the other)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """The steps of every row, flattened, i32 [b * steps]: the output tile that a step adds to (never decreasing,
    every one at least once) and the input tile that it reads. count, i32 [b]: steps that do something; later ones
    repeat the tiles of the last, so that nothing is copied."""

    output: jax.Array
    input: jax.Array
    count: jax.Array


def visits(low_bo: jax.Array, high_bo: jax.Array, steps: int) -> Visits:
    """Steps that pair every output tile o with the input tiles low_bo ... high_bo, of which there is at least one."""
    counts = high_bo - low_bo + 1
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    step = jnp.minimum(jnp.arange(steps, dtype=jnp.int32)[None], ends[:, -1:] - 1)
    output = jax.vmap(lambda e, s: jnp.searchsorted(e, s, side="right"))(ends, step).astype(jnp.int32)
    take = jax.vmap(lambda x, i: x[i])
    inputs = take(low_bo, output) + step - take(ends - counts, output)
    return Visits(output.reshape(-1), inputs.astype(jnp.int32).reshape(-1), ends[:, -1])


def readers(ids_bie: jax.Array, tile: int, values: int) -> tuple[jax.Array, jax.Array]:
    """For every tile i of entries e with ids i32 [b, i, e], which never decrease along i and e: the first and the
    last of the `values` tiles of `tile` values that it names, i32 [b, i] each."""
    return tuple(jnp.clip(ids_bie[:, :, end] // tile, 0, values - 1) for end in (0, -1))


def members(ids_bie: jax.Array, tile: int, values: int) -> tuple[jax.Array, jax.Array]:
    """The converse: for every tile of `tile` values the first and the last tile of entries that names one of them,
    i32 [b, values] each; any tile where none does."""
    first = jnp.arange(values, dtype=jnp.int32) * tile

    def row(ids_ie: jax.Array) -> tuple[jax.Array, jax.Array]:
        low = jnp.searchsorted(ids_ie[:, -1], first, side="left")
        high = jnp.searchsorted(ids_ie[:, 0], first + tile, side="left") - 1
        low = jnp.clip(low, 0, ids_ie.shape[0] - 1).astype(jnp.int32)
        return low, jnp.clip(high, low, ids_ie.shape[0] - 1).astype(jnp.int32)

    return jax.vmap(row)(ids_bie)
