"""Attention of one query per row to what a compact, ragged cache holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cache_attention import kernel, ref
from pallas_kernels.dispatch import check_kind, check_shape, choose

# Entries of a page must fill whole tiles of the chip's memory.
TILE = {4: 8, 2: 16, 1: 32}


def cache_attention(
    q_bhgk: jax.Array,
    k_pck: jax.Array,
    v_pck: jax.Array,
    lengths_bh: jax.Array,
    pages: jax.Array,
    first_bh: jax.Array | None = None,
    *,
    k_scale_p1c: jax.Array | None = None,
    v_scale_p1c: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One decode step: softmax attention with scores over sqrt(k), for every row and key/value head on its own.

    Args:
      q_bhgk: [b, h, g, k], the g query heads of every key/value head.
      k_pck, v_pck: pages [p, c, k] of c entries, in the dtype of the queries; or int8, to be multiplied by
        k_scale_p1c, v_scale_p1c: f32 [p, 1, c]. The order of entries means nothing. Entries beyond a row's length are
        never used but must be finite.
      lengths_bh: i32 [b, h], entries of every row; 0 for none.
      pages: i32 [b, h, n], pages of every row (the last is filled in part, and those after it are not looked at); or
        i32 [m], all rows' pages, with those of a row from first_bh, i32 [b, h], on.
      implementation: "reference", "tpu", "interpret" (the kernel's program on any machine), or None: the kernel on
        TPU, the reference elsewhere. The kernel reads live pages only; its pages hold a multiple of 8 (float32), 16
        (bfloat16) or 32 (int8) entries.
    Returns: f32 [b, h, g, k], zeros where a row holds nothing, and the log-sum-exp of its scores, f32 [b, h, g]
    (-1e30 there), by which `merge` joins attention to several caches. Not differentiable in the kernel.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("q_bhgk", q_bhgk, (None,) * 4)
    b, h, g, size = q_bhgk.shape
    check_shape("k_pck", k_pck, (None, None, size))
    check_shape("v_pck", v_pck, k_pck.shape)
    check_shape("lengths_bh", lengths_bh, (b, h))
    for name, x in (("lengths_bh", lengths_bh), ("pages", pages)):
        check_kind(name, x, jnp.integer)
    scales = _scales(q_bhgk, k_pck, v_pck, k_scale_p1c, v_scale_p1c)
    page = k_pck.shape[1]
    if first_bh is None:
        check_shape("pages", pages, (b, h, None))
        first_bh = jnp.arange(b * h, dtype=jnp.int32).reshape(b, h) * pages.shape[2]
    else:
        check_shape("pages", pages, (None,))
        check_shape("first_bh", first_bh, (b, h))
    chosen = choose(implementation)
    q, lengths, first = q_bhgk.reshape(b * h, g, size), lengths_bh.reshape(-1), first_bh.reshape(-1)
    if chosen == "reference":
        table = pages
        if pages.ndim == 1:
            at = first[:, None] + jnp.arange(pages.shape[0])[None]
            table = pages[jnp.minimum(at, pages.shape[0] - 1)]
        out, lse = ref.cache_attention(q, k_pck, v_pck, lengths, table.reshape(b * h, -1), *scales)
        return out.reshape(q_bhgk.shape), lse.reshape(b, h, g)
    if not fits(page, k_pck.dtype):
        tile = TILE[k_pck.dtype.itemsize]
        raise ValueError(
            f"k_pck: the TPU kernel needs a multiple of {tile} {k_pck.dtype} entries per page, got {page}"
        )
    sources, interpret = (k_pck, v_pck, *scales), chosen == "interpret"
    lengths, pages, first = (x.reshape(-1).astype(jnp.int32) for x in (lengths, pages, first))
    out, lse = kernel.cache_attention(q, sources, lengths, pages, first, interpret)
    out = jnp.where(jnp.broadcast_to((lengths > 0)[:, None, None], out.shape), out, 0.0)
    lse = jnp.where(jnp.broadcast_to((lengths > 0)[:, None], lse.shape), lse, ref.NEGATIVE)
    return out.reshape(q_bhgk.shape), lse.reshape(b, h, g)


def fits(page: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes pages of so many entries."""
    return page % TILE[jnp.dtype(dtype).itemsize] == 0


def _scales(
    q: jax.Array, k: jax.Array, v: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None
) -> tuple[jax.Array, ...]:
    check_kind("q_bhgk", q, jnp.floating)
    if k.dtype == v.dtype == jnp.int8:
        for name, x in (("k_scale_p1c", k_scale), ("v_scale_p1c", v_scale)):
            if x is None:
                raise ValueError(f"{name}: int8 pages need scales")
            check_shape(name, x, (k.shape[0], 1, k.shape[1]))
        return k_scale.astype(jnp.float32), v_scale.astype(jnp.float32)
    if k_scale is not None or v_scale is not None:
        raise ValueError(f"k_scale_p1c, v_scale_p1c: only int8 pages have scales, these are {k.dtype} and {v.dtype}")
    if not k.dtype == v.dtype == q.dtype:
        raise ValueError(f"k_pck, v_pck: expected the queries' {q.dtype} or int8, got {k.dtype} and {v.dtype}")
    return ()


def in_pages(x_bhsk: jax.Array, page: int) -> tuple[jax.Array, jax.Array]:
    """A contiguous cache as pages, without a copy: [p, c, k], and their table i32 [b, h, n]. Raises ValueError where
    pages of this size do not divide its capacity s."""
    b, h, s, size = x_bhsk.shape
    if page < 1 or s % page:
        raise ValueError(f"page: {page} entries do not divide the capacity {s}")
    table = jnp.arange(b * h * (s // page), dtype=jnp.int32).reshape(b, h, -1)
    return x_bhsk.reshape(-1, page, size), table
