"""Causal grouped-query attention over packed, padded or cached sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.blockwise import blockwise
from atom_jax.params import ParamSpec, normal, ones
from pallas_kernels.dispatch import NEGATIVE, platform


@struct.dataclass
class Tokens:
    """Where tokens stand: positions i32 [b, t] within a document, segments i32 [b, t] (0 = padding)."""

    positions: jax.Array
    segments: jax.Array

    @property
    def left(self) -> jax.Array:
        """i32 [b, t]: tokens of the same document after each one in its row; 0 for padding."""
        t = self.segments.shape[1]
        following = jnp.concatenate([self.segments[:, 1:], jnp.full_like(self.segments[:, :1], -1)], axis=1)
        places = jnp.arange(t)[None]
        last = jax.lax.cummin(jnp.where(following != self.segments, places, t), axis=1, reverse=True)
        return jnp.where(self.segments > 0, last - places, 0)


def attention_spec(d: int, n: int, h: int, k: int, qk_norm: str, out_scale: float = 1.0) -> dict[str, ParamSpec]:
    """Projections of an attention layer: width d, n query heads, h key/value heads of size k.

    qk_norm: "none", "head" (one weight [k] for every head, Qwen3) or "full" (over all heads at once, OLMo 2).
    """
    spec = {
        "q": ParamSpec((d, n, k), ("embed", "heads", None), normal(d**-0.5)),
        "k": ParamSpec((d, h, k), ("embed", "kv_heads", None), normal(d**-0.5)),
        "v": ParamSpec((d, h, k), ("embed", "kv_heads", None), normal(d**-0.5)),
        "o": ParamSpec((n, k, d), ("heads", None, "embed"), normal(out_scale * (n * k) ** -0.5)),
    }
    if qk_norm == "head":
        spec |= {"q_norm": ParamSpec((k,), (None,), ones), "k_norm": ParamSpec((k,), (None,), ones)}
    if qk_norm == "full":
        spec |= {
            "q_norm": ParamSpec((n * k,), ("heads",), ones),
            "k_norm": ParamSpec((h * k,), ("kv_heads",), ones),
        }
    return spec


def mask(q: Tokens, k: Tokens, window: int | None) -> jax.Array:
    """bool [b, t, s]: same document, not in the future, and less than `window` tokens back."""
    distance = q.positions[:, :, None] - k.positions[:, None, :]
    seen = (q.segments[:, :, None] == k.segments[:, None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def block_size(s: int, rows: int = 1) -> int:
    """Queries and keys per tile for s keys of so many rows. On a CPU a tile should stay in the second-level cache;
    small ones leave out more where rows hold several documents."""
    if platform() == "cpu":
        return 64 if s <= (512 if rows == 1 else 1536) else 256
    return 512


def attend(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    q: Tokens,
    k: Tokens,
    *,
    window: int | None = None,
    aligned: bool = False,
    keep_bhs: jax.Array | None = None,
    keep_window: int = 0,
    bias_bhs: jax.Array | None = None,
    start: jax.Array | None = None,
    single: bool = False,
) -> jax.Array:
    """Softmax attention with scores over sqrt(k), float32 softmax; memory linear in t and s for long inputs.

    Args:
      q_bhgtk: queries, g heads for each of the h key/value heads. k_bhsk, v_bhsk: keys and values.
      q, k: where queries and keys stand; a query sees keys of its own segment that are not after it.
      window: a query sees only keys fewer than `window` positions back (None: all).
      aligned: True promises that key i stands where query i stands, and that neighbours in a segment stand one place
        apart, so that blocks above the diagonal or outside the window are never computed. start: i32 [], with it key
        start + i stands where query i stands.
      single: True promises of aligned rows that each holds one segment, with padding after it, if any: its tokens see
        none of that in any case, so that kernels need no segments.
      keep_bhs: added to the scores that a key gets from queries more than `keep_window` positions after it: the log-
        probability that it was kept (Dynamic Memory Sparsification), 0 or less; None: every key is kept.
      bias_bhs: added to the scores of every key, see `with_bias`; None: nothing.
    Returns: [b, h, g, t, k] in the dtype of the queries. Rows that see no key return finite, meaningless values.
    """
    if bias_bhs is not None:
        options = {"window": window, "aligned": aligned, "keep_bhs": keep_bhs, "keep_window": keep_window}
        wider = with_bias(q_bhgtk, k_bhsk, v_bhsk, bias_bhs)
        return attend(*wider, q, k, start=start, single=single, **options)[..., :-1]
    t, s = q_bhgtk.shape[3], k_bhsk.shape[2]
    if t == 1 and keep_bhs is None:
        return _attend_one(q_bhgtk[..., 0, :], k_bhsk, v_bhsk, mask(q, k, window)[:, None])[..., None, :]
    block = block_size(s, len(q_bhgtk))
    if t * s > block * block:
        places = (q.positions, q.segments, k.positions, k.segments)
        rest = (keep_bhs, keep_window, start, single)
        return blockwise(q_bhgtk, k_bhsk, v_bhsk, places, window, aligned, block, *rest)
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q_bhgtk, k_bhsk, preferred_element_type=jnp.float32)
    scores = scores * q_bhgtk.shape[-1] ** -0.5
    if keep_bhs is not None:
        far = (q.positions[:, :, None] - k.positions[:, None, :])[:, None] > keep_window
        scores += jnp.where(far, keep_bhs[:, :, None].astype(jnp.float32), 0.0)[:, :, None]
    seen = jnp.broadcast_to(mask(q, k, window)[:, None, None], scores.shape)
    scores = jnp.where(seen, scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bhsk.dtype)
    return jnp.einsum("bhgts,bhsk->bhgtk", weights, v_bhsk).astype(q_bhgtk.dtype)


def attend_parts(
    q_bhgtk: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array, Tokens]],
    q: Tokens,
    *,
    window: int | None = None,
) -> jax.Array:
    """`attend` for a few queries per row, to keys and values [b, h, s, k] that lie in several arrays, each with where
    its keys stand: as if they lay in one, without moving them there."""
    scores, size = [], q_bhgtk.shape[-1]
    for k_bhsk, _, k in parts:
        part = jnp.einsum("bhgtk,bhsk->bhgts", q_bhgtk, k_bhsk, preferred_element_type=jnp.float32) * size**-0.5
        seen = jnp.broadcast_to(mask(q, k, window)[:, None, None], part.shape)
        scores.append(jnp.where(seen, part, NEGATIVE))
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in scores])
    weights = [jnp.exp(part - top) for part in scores]
    out = sum(
        jnp.einsum("bhgts,bhsk->bhgtk", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts)
    )
    return (out / sum(w.sum(-1, keepdims=True) for w in weights)).astype(q_bhgtk.dtype)


def with_bias(
    q_bhgtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, bias_bhs: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values with one more channel, by which `attend` adds `bias_bhs` to the scores of every key;
    its outputs have that channel, too, which means nothing."""
    size = q_bhgtk.shape[-1]
    # The scores are divided by the root of the new size.
    q = jnp.pad(q_bhgtk * jnp.asarray(((size + 1) / size) ** 0.5, q_bhgtk.dtype), [(0, 0)] * 4 + [(0, 1)])
    q = q.at[..., size].set((size + 1) ** 0.5)
    k = jnp.concatenate([k_bhsk, bias_bhs[..., None].astype(k_bhsk.dtype)], axis=-1)
    return q, k, jnp.pad(v_bhsk, [(0, 0)] * 3 + [(0, 1)])


def _attend_one(q_bhgk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, seen_b11s: jax.Array) -> jax.Array:
    """`attend` for one query per row. Without the axis of length one, and with the division after the second
    product, a CPU reads the keys and values up to four times faster."""
    scores = jnp.einsum("bhgk,bhsk->bhgs", q_bhgk, k_bhsk, preferred_element_type=jnp.float32)
    scores = scores * q_bhgk.shape[-1] ** -0.5
    scores = jnp.where(jnp.broadcast_to(seen_b11s, scores.shape), scores, NEGATIVE)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("bhgs,bhsk->bhgk", weights.astype(v_bhsk.dtype), v_bhsk, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(q_bhgk.dtype)
