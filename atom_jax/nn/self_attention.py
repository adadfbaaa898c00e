"""Attention of whole sequences to themselves on a mesh: rows, heads and positions spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens, attend, block_size, with_bias
from atom_jax.nn.blockwise import blockwise_lse, one_softmax
from atom_jax.sharding import partition


@struct.dataclass
class Newest:
    """Keys and values [b, h, t, k] that queries see of the `window` (static, at least 1) places up to their own, in
    place of others which they see of the places before these."""

    k: jax.Array
    v: jax.Array
    window: int = struct.field(pytree_node=False)


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
    newest: Newest | None = None,
) -> jax.Array:
    """`attention.attend` where key i stands where query i stands. bias_bht: added to the scores of every key.

    newest: with it a query sees key i, with its bias, only where that stands at least `newest.window` places back,
    and `keep_bht` acts where it stands further back than that; no other window is possible then.

    Every device attends for its own rows and heads. Along the mesh axis "context" it does so for two pieces of the
    row, an early one and a late one, so that all have equally much to do, and gathers the keys and values of the row.
    """
    if newest is not None:
        return _delayed(q_bhgtk, k_bhtk, v_bhtk, tokens, keep_bht, bias_bht, newest)
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


def _delayed(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, keep: jax.Array | None, bias: jax.Array | None,
    newest: Newest,
) -> jax.Array:  # fmt: skip
    """`self_attend` with `newest`. On a mesh every device attends for its rows and heads, to whole rows."""
    window, t = newest.window, q.shape[3]
    block = block_size(t, len(q))

    def back(x: jax.Array, axis: int, empty: int = 0) -> jax.Array:
        pad = [(window if i == axis else 0, 0) for i in range(x.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(x, pad, constant_values=empty), 0, t, axis=axis)

    def local(q, k, v, keep, bias, k_new, v_new, positions, segments):
        near = blockwise_lse(q, k_new, v_new, (positions, segments) * 2, window, True, block)
        # Seen from `window` places before a query, the others are those up to it.
        places = (positions - window, segments, back(positions, 1), back(segments, 1, -1))
        k, v, keep, bias = jax.tree.map(lambda x: back(x, 2), (k, v, keep, bias))
        args = (q, k, v) if bias is None else with_bias(q, k, v, bias)
        out, lse = blockwise_lse(*args, places, None, True, block, keep, 0)
        return one_softmax([near, (out[..., : q.shape[-1]], lse)]).astype(q.dtype)

    args = (q, k, v, keep, bias, newest.k, newest.v, tokens.positions, tokens.segments)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return local(*args)
    rows, heads, groups, _, _ = partition(q.shape, ("batch", "kv_heads", "heads", None, None), mesh)
    q_spec, kv_spec = jax.P(rows, heads, groups), jax.P(rows, heads)
    specs = (q_spec, *[kv_spec] * 6, jax.P(rows), jax.P(rows))
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(*args)


def _owner(piece: int, shards: int) -> int:
    """The device that attends for a piece: device j for pieces j and 2 shards - 1 - j."""
    return min(piece, 2 * shards - 1 - piece)
