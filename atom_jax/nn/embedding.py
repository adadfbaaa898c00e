"""Embedding lookup."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.sharding import partition

# Up to so many tokens a table that is also the head's is kept in a second, transposed copy while a CPU generates: the
# product of a few states with the table as it is costs up to five times as much there.
SMALL_VOCAB = 4096


def lookup(table_vd: jax.Array, ids_bt: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the table, [b, t, d] in `dtype`; ids i32 [b, t] in [0, v).

    On a mesh every device looks up, in its own part of the table, what all devices that share its rows need, and
    sends them that: neither the table nor its gradient is ever whole on a device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    vocab, embed = (None, None) if mesh.empty else partition(table_vd.shape, ("vocab", "embed"), mesh)
    rows, length = (None, None) if mesh.empty else partition(ids_bt.shape, ("batch", "length"), mesh)
    shares_rows = embed is None or embed == rows or (isinstance(rows, tuple) and embed in rows)
    if (vocab, rows, length) == (None, None, None) or not shares_rows:
        return jnp.take(table_vd, ids_bt, axis=0).astype(dtype)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if embed is not None:
            ids = jax.lax.all_gather(ids, embed, axis=0, tiled=True)
        if vocab is None:
            x = jnp.take(table, ids, axis=0).astype(dtype)
        else:
            ids = ids - jax.lax.axis_index(vocab) * table.shape[0]
            here = ((ids >= 0) & (ids < table.shape[0]))[..., None]
            x = jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
            x = jax.lax.psum(jnp.where(here, x, 0), vocab)
        return x if embed is None else jax.lax.all_to_all(x, embed, 0, 2, tiled=True)

    specs = (jax.P(vocab, embed), jax.P(rows, length))
    return jax.shard_map(local, in_specs=specs, out_specs=jax.P(rows, length, None))(table_vd, ids_bt)
