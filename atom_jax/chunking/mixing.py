"""What happens to the chunks' outputs before positions read them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atom_jax.chunking.segments import linear_scan

# Probabilities stay this far from 0 and 1, so that even a chunk that was certain to begin keeps some of the past.
MARGIN = 1e-4


def ema(v_bmd: jax.Array, p_bm: jax.Array, real_bm: jax.Array, segments_bm: jax.Array, z_bd: jax.Array) -> jax.Array:
    """H-Net's smoothing (arXiv 2507.07955, 2.2.2): z_j = P_j v_j + (1 - P_j) z_{j-1}, in float32.

    Args:
      v_bmd: outputs of the inner network. p_bm: f32, probability of the mark of each chunk.
      real_bm: bool, False in unused slots, which repeat the value before them.
      segments_bm: i32, document of each chunk; where it changes from one chunk to the next, z starts from zero.
      z_bd: z of the latest chunk of earlier calls, which chunk 0 continues; zeros where a document begins.
    Returns: f32 [b, m, d].
    """
    p = jnp.clip(p_bm.astype(jnp.float32), MARGIN, 1 - MARGIN)
    same = jnp.pad(segments_bm[:, 1:] == segments_bm[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    keep_bm1 = jnp.where(real_bm, (1 - p) * same, 1.0)[:, :, None]
    x_bmd = jnp.where(real_bm, p, 0.0)[:, :, None] * v_bmd.astype(jnp.float32)
    z_bmd = keep_bm1[:, :1] * z_bd.astype(jnp.float32)[:, None] + x_bmd[:, :1]
    if v_bmd.shape[1] == 1:
        return z_bmd
    return linear_scan(keep_bm1, jnp.concatenate([z_bmd, x_bmd[:, 1:]], axis=1))
