"""Attention in blocks with an online softmax: memory linear in length, forward and backward.

The scheme is FlashAttention's (Dao et al., 2022; Rabe & Staats, 2021) in plain jnp, with a custom gradient that
recomputes the scores of a block instead of storing them. On TPUs, and on NVIDIA GPUs in bfloat16, sequences attend to
themselves in a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from atom_jax.sharding import partition
from pallas_kernels.dispatch import NEGATIVE, platform
from pallas_kernels.evict_attention.api import choose, evict_attention

Places = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# Queries of the lowest tile.
_LEAST = 8
# Tiles along a row from which on it is worth a loop over rows, which takes half as long again to compile.
_MANY = 8


def blockwise(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    places: Places,
    window: int | None,
    aligned: bool,
    block: int,
    keep_bhs: jax.Array | None = None,
    keep_window: int = 0,
    start: jax.Array | None = None,
    single: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Attention as `attention.attend` defines it, one [block, block] tile of scores at a time; fewer queries than
    that make lower tiles.

    places: query positions [b, t], query segments [b, t], key positions [b, s], key segments [b, s], all i32.
    single: as in `attend`. implementation: of aligned sequences, as in `evict_attention`.
    Returns [b, h, g, t, k] in the dtype of the queries.
    """
    if aligned:
        segments = None if single else (places[1], places[3])
        out = _kernel(q_bhgtk, k_bhsk, v_bhsk, segments, window, keep_bhs, keep_window, start, False, implementation)
        if out is not None:
            return out[0]
    blocks = _blocks(q_bhgtk.shape[3], aligned, block)
    args = _padded(q_bhgtk, k_bhsk, v_bhsk, keep_bhs, places, blocks)
    start = jnp.int32(0) if start is None else start

    def run(*args):
        return _attend(*args, start, (window, keep_window), aligned, blocks)[0]

    return _apart(run, *args, aligned=aligned, tiles=args[0].shape[3] // blocks[0])[..., : q_bhgtk.shape[3], :]


def blockwise_lse(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    places: Places,
    window: int | None,
    aligned: bool,
    block: int,
    keep_bhs: jax.Array | None = None,
    keep_window: int = 0,
    implementation: str | None = None,
    start: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What `blockwise` returns, and the log-sum-exp of every query's scores, float32 [b, h, g, t] (at most -1e30
    where it sees no key). Differentiable through both."""
    if aligned:
        segments = (places[1], places[3])
        out = _kernel(q_bhgtk, k_bhsk, v_bhsk, segments, window, keep_bhs, keep_window, start, True, implementation)
        if out is not None:
            return out
    t = q_bhgtk.shape[3]
    blocks = _blocks(t, aligned, block)
    args = _padded(q_bhgtk, k_bhsk, v_bhsk, keep_bhs, places, blocks)

    start = jnp.int32(0) if start is None else start

    def run(*args):
        return _attend(*args, start, (window, keep_window), aligned, blocks)

    out, lse = _apart(run, *args, aligned=aligned, tiles=args[0].shape[3] // blocks[0])
    return out[..., :t, :], lse[..., :t]


def one_softmax(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Attention over all keys, float32 [b, h, g, t, k], from outputs and log-sum-exps, as of `blockwise_lse`, over
    disjoint parts of them; finite and meaningless for queries that see no key of any part."""
    highest = functools.reduce(jnp.maximum, [lse for _, lse in parts])
    weights = [jnp.exp(lse - highest) for _, lse in parts]
    out = sum(w[..., None] * out.astype(jnp.float32) for w, (out, _) in zip(weights, parts))
    return out / sum(weights)[..., None]


def _apart(run: Callable[..., Any], *args: Any, aligned: bool, tiles: int) -> Any:
    """`run` of arrays that have rows in front, row by row where tiles that only some rows see are worth leaving out:
    on a CPU, where one row fills it."""
    if platform() != "cpu" or not (aligned and _local() and tiles >= _MANY) or len(args[0]) == 1:
        return run(*args)

    def row(args):
        return jax.tree.map(lambda x: x[0], run(*jax.tree.map(lambda x: x[None], args)))

    return jax.lax.map(row, args)


def _local() -> bool:
    """Whether arrays lie on one device, or are what one of several has."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size <= 1 or AxisType.Manual in mesh.axis_types


def _kernel(q, k, v, segments, window, keep, keep_window, start, with_lse, implementation):
    """Both results of `evict_attention`, on the devices that hold the rows and heads; None where no kernel takes such
    arrays."""
    given = {"keep": keep is not None, "segments": segments is not None, "offset": start is not None}
    chosen = choose(q, k, **given, with_lse=with_lse, implementation=implementation)
    if chosen == "reference":
        return None

    def run(q, k, v, keep, segments, start):
        return evict_attention(
            q, k, v, keep, keep_window=keep_window, window=window, segments=segments,
            q_start=0 if start is None else start, with_lse=with_lse, implementation=chosen,
        )  # fmt: skip

    args = (q, k.astype(q.dtype), v.astype(q.dtype), keep, segments, start)
    if _local():
        return run(*args)
    mesh = jax.sharding.get_abstract_mesh()
    both, rows = (partition(k.shape[:n], ("batch", "kv_heads")[:n], mesh) for n in (2, 1))
    return jax.shard_map(run, in_specs=(both, both, both, both, rows, P()), out_specs=both, check_vma=False)(*args)


def _blocks(t: int, aligned: bool, block: int) -> tuple[int, int]:
    """Queries and keys of a tile for t queries. Where these stand at their keys, both are the same."""
    return block if aligned else min(block, -(-t // _LEAST) * _LEAST), block


def _padded(q, k, v, keep, places, blocks):
    """Everything filled up to whole blocks, and the queries divided by the root of the head size."""
    pad_q, pad_k = -q.shape[3] % blocks[0], -k.shape[2] % blocks[1]
    q = jnp.pad(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), _at(5, 3, pad_q))
    k, v = jnp.pad(k, _at(4, 2, pad_k)), jnp.pad(v, _at(4, 2, pad_k))
    keep = None if keep is None else jnp.pad(keep.astype(jnp.float32), _at(3, 2, pad_k))
    q_pos, q_seg = (jnp.pad(x, _at(2, 1, pad_q)) for x in places[:2])
    k_pos = jnp.pad(places[2], _at(2, 1, pad_k))
    k_seg = jnp.pad(places[3], _at(2, 1, pad_k), constant_values=-1)
    return q, k, v, keep, (q_pos, q_seg, k_pos, k_seg)


def _at(rank: int, axis: int, amount: int) -> list[tuple[int, int]]:
    return [(0, amount if i == axis else 0) for i in range(rank)]


def _tile(x: jax.Array, i: jax.Array, axis: int, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


class _Spans(NamedTuple):
    """Which tiles are computed. keys: i32 [nq], of every query block the first and past-the-last key block that it
    can see; queries: i32 [nk], of every key block the same of the query blocks that can see it."""

    keys: tuple[jax.Array, jax.Array]
    queries: tuple[jax.Array, jax.Array]


def _spans(places: Places, start: jax.Array, window: int | None, aligned: bool, blocks: tuple[int, int]) -> _Spans:
    """Of all rows together. Aligned ones see nothing beyond the ends of their segment, nor after themselves."""
    rows, block = blocks
    nq, nk = places[0].shape[1] // rows, places[2].shape[1] // block
    i, j = jnp.arange(nq), jnp.arange(nk)
    if not aligned:
        return _Spans((jnp.zeros_like(i), jnp.full_like(i, nk)), (jnp.zeros_like(j), jnp.full_like(j, nq)))
    segment, at = places[3], jnp.arange(nk * block)
    new = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new[:, :-1], at, 0), axis=1).min(0)
    last = jax.lax.cummin(jnp.where(new[:, 1:], at, nk * block), axis=1, reverse=True).max(0)
    here, there = start + i * block, j * block - start
    low, high = first[jnp.clip(here, 0, nk * block - 1)], last[(j + 1) * block - 1] - start
    if window is not None:
        low, high = jnp.maximum(low, here - window + 1), jnp.minimum(high, there + block + window - 2)
    keys = jnp.maximum(low, 0) // block, jnp.minimum((here + block - 1) // block + 1, nk)
    return _Spans(keys, (jnp.maximum(there // block, 0), jnp.minimum(high // block + 1, nq)))


def _scores(
    q: jax.Array, k: jax.Array, keep: jax.Array | None, places: Places, windows: tuple
) -> tuple[jax.Array, Any]:
    """Masked scores float32 [b, h, g, t, s] of one tile, q being scaled already; and where keys are so far back that
    `keep` counts, bool [b, t, s] (None without it)."""
    window, keep_window = windows
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k, preferred_element_type=jnp.float32)
    q_pos, q_seg, k_pos, k_seg = places
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (q_seg[:, :, None] == k_seg[:, None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    far = None
    if keep is not None:
        far = distance > keep_window
        scores += jnp.where(far[:, None], keep[:, :, None], 0.0)[:, :, None]
    return jnp.where(jnp.broadcast_to(seen[:, None, None], scores.shape), scores, NEGATIVE), far


def _tiles(places: Places, i: jax.Array, j: jax.Array, blocks: tuple[int, int]) -> Places:
    return (*(_tile(x, i, 1, blocks[0]) for x in places[:2]), *(_tile(x, j, 1, blocks[1]) for x in places[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, keep, places, start, windows, aligned, blocks):
    return _forward(q, k, v, keep, places, start, windows, aligned, blocks)


def _keep_tile(keep, j, block):
    return None if keep is None else _tile(keep, j, 2, block)


def _forward(q, k, v, keep, places, start, windows, aligned, blocks):
    b, h, g, t, d = q.shape
    rows, block = blocks
    first, last = _spans(places, start, windows[0], aligned, blocks).keys

    def one(i):
        q_i = _tile(q, i, 3, rows)

        def visit(j, carry):
            total, top, out = carry
            k_j = _tile(k, j, 2, block)
            s, _ = _scores(q_i, k_j, _keep_tile(keep, j, block), _tiles(places, i, j, blocks), windows)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            new = jnp.einsum("bhgts,bhsk->bhgtk", p.astype(v.dtype), _tile(v, j, 2, block),
                             preferred_element_type=jnp.float32)  # fmt: skip
            return total * shrink + p.sum(-1), new_top, out * shrink[..., None] + new

        zero = jnp.zeros((b, h, g, rows), jnp.float32)
        nothing = (zero, zero + NEGATIVE, jnp.zeros((b, h, g, rows, d), jnp.float32))
        total, top, out = jax.lax.fori_loop(first[i], last[i], visit, nothing)
        total = jnp.maximum(total, 1e-30)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(one, jnp.arange(t // rows))
    return _join(out, 3), _join(lse, 3)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """[n, ..., block, ...] to [..., n * block, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _forward_rule(q, k, v, keep, places, start, windows, aligned, blocks):
    out, lse = _forward(q, k, v, keep, places, start, windows, aligned, blocks)
    return (out, lse), (q, k, v, keep, places, start, out, lse)


def _backward_rule(windows, aligned, blocks, saved, gradients):
    q, k, v, keep, places, start, out, lse = saved
    rows, block = blocks
    first, last = _spans(places, start, windows[0], aligned, blocks).queries
    d_out, d_lse = gradients
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse

    def one(d_q, j):
        k_j, v_j = _tile(k, j, 2, block), _tile(v, j, 2, block)

        def visit(i, carry):
            d_q, d_k, d_v, d_keep = carry
            q_i, d_i = _tile(q, i, 3, rows), _tile(d_out, i, 3, rows)
            s, far = _scores(q_i, k_j, _keep_tile(keep, j, block), _tiles(places, i, j, blocks), windows)
            p = jnp.exp(s - _tile(lse, i, 3, rows)[..., None])
            d_p = jnp.einsum("bhgtk,bhsk->bhgts", d_i, v_j, preferred_element_type=jnp.float32)
            d_s = p * (d_p - _tile(delta, i, 3, rows)[..., None])
            if keep is not None:
                d_keep += jnp.einsum("bhgts,bts->bhs", d_s, far.astype(jnp.float32))
            d_s, p = d_s.astype(q.dtype), p.astype(q.dtype)
            d_v += jnp.einsum("bhgts,bhgtk->bhsk", p, d_i, preferred_element_type=jnp.float32)
            d_k += jnp.einsum("bhgts,bhgtk->bhsk", d_s, q_i, preferred_element_type=jnp.float32)
            add = jnp.einsum("bhgts,bhsk->bhgtk", d_s, k_j, preferred_element_type=jnp.float32)
            here = _tile(d_q, i, 3, rows) + add
            return jax.lax.dynamic_update_slice_in_dim(d_q, here, i * rows, 3), d_k, d_v, d_keep

        zero = jnp.zeros(k_j.shape, jnp.float32)
        none = None if keep is None else jnp.zeros(k_j.shape[:3], jnp.float32)
        d_q, d_k, d_v, d_keep = jax.lax.fori_loop(first[j], last[j], visit, (d_q, zero, zero, none))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype), d_keep)

    d_q, (d_k, d_v, d_keep) = jax.lax.scan(one, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(first)))
    d_keep = None if keep is None else _join(d_keep, 2)
    return d_q.astype(q.dtype), _join(d_k, 2), _join(d_v, 2), d_keep, None, None


_attend.defvjp(_forward_rule, _backward_rule)
