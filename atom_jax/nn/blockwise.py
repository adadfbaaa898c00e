"""Attention in blocks with an online softmax: memory linear in length, forward and backward.

The scheme is FlashAttention's (Dao et al., 2022; Rabe & Staats, 2021) in plain jnp, with a custom gradient that
recomputes the scores of a block instead of storing them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

NEGATIVE = -1e30
Places = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def blockwise(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    places: Places,
    window: int | None,
    aligned: bool,
    block: int,
) -> jax.Array:
    """Attention as `attention.attend` defines it, one [block, block] tile of scores at a time.

    places: query positions [b, t], query segments [b, t], key positions [b, s], key segments [b, s], all i32.
    Returns [b, h, g, t, k] in the dtype of the queries.
    """
    t, s = q_bhgtk.shape[3], k_bhsk.shape[2]
    pad_q, pad_k = -t % block, -s % block
    q = jnp.pad(q_bhgtk * jnp.asarray(q_bhgtk.shape[-1] ** -0.5, q_bhgtk.dtype), _at(5, 3, pad_q))
    k, v = jnp.pad(k_bhsk, _at(4, 2, pad_k)), jnp.pad(v_bhsk, _at(4, 2, pad_k))
    q_pos, q_seg = (jnp.pad(x, _at(2, 1, pad_q)) for x in places[:2])
    k_pos = jnp.pad(places[2], _at(2, 1, pad_k))
    k_seg = jnp.pad(places[3], _at(2, 1, pad_k), constant_values=-1)
    return _attend(q, k, v, (q_pos, q_seg, k_pos, k_seg), window, aligned, block)[..., :t, :]


def _at(rank: int, axis: int, amount: int) -> list[tuple[int, int]]:
    return [(0, amount if i == axis else 0) for i in range(rank)]


def _tile(x: jax.Array, i: jax.Array, axis: int, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _key_range(i: jax.Array, nk: int, window: int | None, aligned: bool, block: int) -> tuple:
    """First and past-the-last key block that query block i can see."""
    if not aligned:
        return 0, nk
    first = 0 if window is None else jnp.maximum(i * block - window + 1, 0) // block
    return first, jnp.minimum(i + 1, nk)


def _query_range(j: jax.Array, nq: int, window: int | None, aligned: bool, block: int) -> tuple:
    """First and past-the-last query block that can see key block j."""
    if not aligned:
        return 0, nq
    last = nq if window is None else jnp.minimum(((j + 1) * block + window - 2) // block + 1, nq)
    return j, last


def _scores(q: jax.Array, k: jax.Array, places: Places, window: int | None) -> jax.Array:
    """Masked scores float32 [b, h, g, block, block] of one tile; q is already scaled."""
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k, preferred_element_type=jnp.float32)
    q_pos, q_seg, k_pos, k_seg = places
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (q_seg[:, :, None] == k_seg[:, None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    return jnp.where(jnp.broadcast_to(seen[:, None, None], scores.shape), scores, NEGATIVE)


def _tiles(places: Places, i: jax.Array, j: jax.Array, block: int) -> Places:
    return (*(_tile(x, i, 1, block) for x in places[:2]), *(_tile(x, j, 1, block) for x in places[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, places, window, aligned, block):
    return _forward(q, k, v, places, window, aligned, block)[0]


def _forward(q, k, v, places, window, aligned, block):
    b, h, g, t, d = q.shape
    nq, nk = t // block, k.shape[2] // block

    def one(i):
        q_i = _tile(q, i, 3, block)

        def visit(j, carry):
            total, top, out = carry
            s = _scores(q_i, _tile(k, j, 2, block), _tiles(places, i, j, block), window)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            new = jnp.einsum("bhgts,bhsk->bhgtk", p.astype(v.dtype), _tile(v, j, 2, block),
                             preferred_element_type=jnp.float32)  # fmt: skip
            return total * shrink + p.sum(-1), new_top, out * shrink[..., None] + new

        zero = jnp.zeros((b, h, g, block), jnp.float32)
        start = (zero, zero + NEGATIVE, jnp.zeros((b, h, g, block, d), jnp.float32))
        total, top, out = jax.lax.fori_loop(*_key_range(i, nk, window, aligned, block), visit, start)
        total = jnp.maximum(total, 1e-30)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(one, jnp.arange(nq))
    return _join(out, 3), _join(lse, 3)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """[n, ..., block, ...] to [..., n * block, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _forward_rule(q, k, v, places, window, aligned, block):
    out, lse = _forward(q, k, v, places, window, aligned, block)
    return out, (q, k, v, places, out, lse)


def _backward_rule(window, aligned, block, saved, d_out):
    q, k, v, places, out, lse = saved
    nq, nk = q.shape[3] // block, k.shape[2] // block
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def one(d_q, j):
        k_j, v_j = _tile(k, j, 2, block), _tile(v, j, 2, block)

        def visit(i, carry):
            d_q, d_k, d_v = carry
            q_i, d_i = _tile(q, i, 3, block), _tile(d_out, i, 3, block)
            s = _scores(q_i, k_j, _tiles(places, i, j, block), window)
            p = jnp.exp(s - _tile(lse, i, 3, block)[..., None])
            d_p = jnp.einsum("bhgtk,bhsk->bhgts", d_i, v_j, preferred_element_type=jnp.float32)
            d_s = (p * (d_p - _tile(delta, i, 3, block)[..., None])).astype(q.dtype)
            p = p.astype(q.dtype)
            d_v += jnp.einsum("bhgts,bhgtk->bhsk", p, d_i, preferred_element_type=jnp.float32)
            d_k += jnp.einsum("bhgts,bhgtk->bhsk", d_s, q_i, preferred_element_type=jnp.float32)
            add = jnp.einsum("bhgts,bhsk->bhgtk", d_s, k_j, preferred_element_type=jnp.float32)
            here = _tile(d_q, i, 3, block) + add
            return jax.lax.dynamic_update_slice_in_dim(d_q, here, i * block, 3), d_k, d_v

        zero = jnp.zeros(k_j.shape, jnp.float32)
        span = _query_range(j, nq, window, aligned, block)
        d_q, d_k, d_v = jax.lax.fori_loop(*span, visit, (d_q, zero, zero))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(one, jnp.zeros(q.shape, jnp.float32), jnp.arange(nk))
    return d_q.astype(q.dtype), _join(d_k, 2), _join(d_v, 2), None


_attend.defvjp(_forward_rule, _backward_rule)
