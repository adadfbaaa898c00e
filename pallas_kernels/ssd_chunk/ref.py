"""What `ssd_chunk` means: the dual form of Mamba-2 (Dao & Gu, 2024, section 6), block after block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# x [b, t, h, k], time steps and log decays f32 [b, t, h], B and C [b, t, n], documents i32 [b, t].
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def padded(parts: Parts, size: int) -> list[jax.Array]:
    """The same with a multiple of `size` positions. Zeros have time step 0; the document goes on, so that the last
    block ends in the state after position t - 1."""
    more = -parts[-1].shape[1] % size
    wide = [jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2)) for a in parts[:-1]]
    return [*wide, jnp.pad(parts[-1], ((0, 0), (0, more)), mode="edge")]


def ssd(parts: Parts, s_bhkn: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Outputs f32 [b, t, h, k] and the state after the last position, in blocks of `size` positions."""
    b, t = parts[-1].shape
    blocks = tuple(jnp.moveaxis(a.reshape(b, -1, size, *a.shape[2:]), 1, 0) for a in padded(parts, size))
    # Only block states are kept for the gradient; the [b, h, size, size] tiles are computed again.
    one = jax.checkpoint(_block, prevent_cse=False)
    (s_bhkn, _), y = jax.lax.scan(one, (s_bhkn, jnp.zeros(b, jnp.int32)), blocks)
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, *y.shape[3:])[:, :t], s_bhkn


def decay(exponent: jax.Array, seen: jax.Array) -> jax.Array:
    """exp(exponent) where seen, else 0. Sums of decays fall, so that an exponent that counts is above 0 by rounding
    only; at 0, where nothing decays, the gradient is that of exp."""
    seen = jnp.broadcast_to(seen, exponent.shape)
    return jnp.where(seen, jnp.exp(jnp.where(seen & ~(exponent > 0), exponent, 0.0)), 0.0)


def _block(carry: tuple[jax.Array, jax.Array], parts: Parts) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One block: state and document at its end, and outputs f32 [b, i, h, k]."""
    (s_bhkn, before_b), (x_bihk, dt_bih, decay_bih, b_bin, c_bin, document_bi) = carry, parts
    dtype, last_b = x_bihk.dtype, document_bi[:, -1]
    total_bih = jnp.cumsum(decay_bih, axis=1)
    total_bhi = total_bih.transpose(0, 2, 1)
    fed_bihk = x_bihk.astype(jnp.float32) * dt_bih[..., None]

    i = jnp.arange(document_bi.shape[1])
    seen = (document_bi[:, :, None] == document_bi[:, None]) & (i[:, None] >= i[None])[None]
    within = decay(total_bhi[..., None] - total_bhi[..., None, :], seen[:, None])
    scores_bij = jnp.einsum("bin,bjn->bij", c_bin, b_bin, preferred_element_type=jnp.float32)
    weights = (scores_bij[:, None] * within).astype(dtype)
    y = jnp.einsum("bhij,bjhk->bihk", weights, fed_bihk.astype(dtype), preferred_element_type=jnp.float32)

    since = decay(total_bih, (document_bi == before_b[:, None])[..., None])
    y = y + jnp.einsum("bin,bhkn->bihk", c_bin.astype(jnp.float32), s_bhkn) * since[..., None]

    until = decay(total_bih[:, -1:] - total_bih, (document_bi == last_b[:, None])[..., None])
    new = jnp.einsum("bihk,bin->bhkn", fed_bihk * until[..., None], b_bin.astype(jnp.float32))
    # `since` is 0 at the end where a document began in between.
    return (s_bhkn * since[:, -1, :, None, None] + new, last_b), y
