"""Attention of whole sequences to themselves on a mesh: rows, heads and positions spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.nn.attention import Tokens, attend, with_bias
from atom_jax.sharding import partition


def self_attend(
    q_bhgtk: jax.Array,
    k_bhtk: jax.Array,
    v_bhtk: jax.Array,
    tokens: Tokens,
    *,
    window: int | None = None,
    keep_bht: jax.Array | None = None,
    keep_window: int = 0,
    bias_bht: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` where key i stands where query i stands. bias_bht: added to the scores of every key.

    Every device attends for its own rows and heads. Along the mesh axis "context" it does so for two pieces of the
    row, an early one and a late one, so that all have equally much to do, and gathers the keys and values of the row.
    """
    if bias_bht is not None:
        wider = with_bias(q_bhgtk, k_bhtk, v_bhtk, bias_bht)
        return self_attend(*wider, tokens, window=window, keep_bht=keep_bht, keep_window=keep_window)[..., :-1]
    mesh = jax.sharding.get_abstract_mesh()
    options = {"window": window, "keep_window": keep_window, "aligned": True}
    if mesh.size <= 1:
        return attend(q_bhgtk, k_bhtk, v_bhtk, tokens, tokens, keep_bhs=keep_bht, **options)
    t = q_bhgtk.shape[3]
    shards = mesh.shape["context"] if t % (2 * mesh.shape["context"]) == 0 else 1
    rows, heads, groups, _, _ = partition(q_bhgtk.shape, ("batch", "kv_heads", "heads", None, None), mesh)
    length = "context" if shards > 1 else None

    def local(q, k, v, keep, positions, segments):
        if shards == 1:
            here = Tokens(positions, segments)
            return attend(q, k, v, here, here, keep_bhs=keep, **options)
        k, v, keep = jax.tree.map(lambda x: jax.lax.all_gather(x, "context", axis=2, tiled=True), (k, v, keep))
        size = t // (2 * shards)
        out = []
        for parity, piece in enumerate(jnp.split(q, 2, axis=3)):
            there = [(i, _owner(2 * i + parity, shards)) for i in range(shards)]
            piece = jax.lax.ppermute(piece, "context", there)
            j = jax.lax.axis_index("context")
            start = size * jnp.where(j % 2 == parity, j, 2 * shards - 1 - j)
            here = Tokens(*(jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (positions, segments)))
            piece = attend(piece, k, v, here, Tokens(positions, segments), keep_bhs=keep, start=start, **options)
            out.append(jax.lax.ppermute(piece, "context", [(to, i) for i, to in there]))
        return jnp.concatenate(out, axis=3)

    q_spec, kv_spec = jax.P(rows, heads, groups, length, None), jax.P(rows, heads, length, None)
    specs = (q_spec, kv_spec, kv_spec, jax.P(rows, heads, length), jax.P(rows, None), jax.P(rows, None))
    # Kernels do not take part in the check of what varies over which axis.
    spread = jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)
    return spread(q_bhgtk, k_bhtk, v_bhtk, keep_bht, tokens.positions, tokens.segments)


def _owner(piece: int, shards: int) -> int:
    """The device that attends for a piece: device j for pieces j and 2 shards - 1 - j."""
    return min(piece, 2 * shards - 1 - piece)
