"""Causal depthwise convolution over packed, padded or continued sequences, and the latest ids of these."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.nn.attention import Tokens


def documents(tokens: Tokens) -> jax.Array:
    """i32 [b, t]: how many documents of its row have begun within this call, up to and including each position.

    0 means that the position continues what earlier calls read. A document begins where the segment changes or the
    position is 0. Padding on the right counts as its predecessor does.
    """
    segments = tokens.segments
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    begins = (segments > 0) & ((tokens.positions == 0) | (segments != before))
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def remember(ids_bt: jax.Array, tokens: Tokens, before: jax.Array) -> jax.Array:
    """The latest ids of every row after a call, i32 [b, w] like `before`; padding (after the ids) is not read."""
    line = jnp.concatenate([before, ids_bt], axis=1)
    count = jnp.sum(tokens.segments > 0, axis=1)
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, before.shape[1]))(line, count)


def causal_conv(
    x_btc: jax.Array, weight_cj: jax.Array, bias_c: jax.Array, taps_bjc: jax.Array, tokens: Tokens, dilation: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Every channel's weighted sum of j inputs up to each position, `dilation` apart, of which other documents'
    count as zero.

    Args:
      x_btc: inputs [b, t, c]. weight_cj: [c, j], the newest input last. bias_c: [c].
      taps_bjc: the inputs before the first, [b, (j - 1) dilation, c]; zeros before a document's beginning.
      tokens: where the inputs stand; padding may come after the real ones, or before them when taps are zero.
    Returns: f32 [b, t, c] (meaningless at padding), and the taps after the last real input of every row in their own
    dtype; a row without a real input keeps them.
    """
    t, j = x_btc.shape[1], weight_cj.shape[1]
    span = (j - 1) * dilation
    document_bt = documents(tokens)
    inputs = jnp.concatenate([taps_bjc.astype(x_btc.dtype), x_btc], axis=1)
    document = jnp.pad(document_bt, ((0, 0), (span, 0)))
    out = jnp.broadcast_to(bias_c.astype(jnp.float32)[None, None], x_btc.shape)
    for i in range(j):
        seen = slice(i * dilation, i * dilation + t)
        own = (document[:, seen] == document_bt)[..., None]
        tap = jnp.where(own, inputs[:, seen], 0).astype(jnp.float32)
        out = out + tap * weight_cj[:, i].astype(jnp.float32)[None, None]
    end_b = jnp.max(jnp.where(tokens.segments > 0, jnp.arange(1, t + 1)[None], 0), axis=1)
    last = end_b[:, None] + jnp.arange(span)[None]
    own = jnp.take_along_axis(document, last, axis=1) == document_bt[:, -1:]
    taps = jnp.where(own[..., None], jnp.take_along_axis(inputs, last[..., None], axis=1), 0)
    return out, taps.astype(taps_bjc.dtype)
