"""What `mlstm_chunk` means: the stabilised matrix memory of xLSTM (Beck et al., 2024) in blocks, with the limits and
the initial state of Bolmo's published code."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NEGATIVE

# Added to the denominator after stabilisation, so that m must start at 0 and follow the recurrence.
EPS = 1e-6

# q, k [b, h, t, k], v [b, h, t, v], input gates and log forget gates f32 [b, h, t], documents i32 [b, t].
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
# C f32 [b, h, k, v], n f32 [b, h, k], m f32 [b, h].
State = tuple[jax.Array, jax.Array, jax.Array]


def padded(parts: Parts, size: int) -> list[jax.Array]:
    """The same with a multiple of `size` positions; those that are added neither enter the state nor let it fade."""
    *rest, documents = parts
    more = -documents.shape[1] % size
    fill = (0.0, 0.0, 0.0, NEGATIVE, 0.0)
    wide = [
        jnp.pad(a, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (a.ndim - 3), constant_values=f)
        for a, f in zip(rest, fill)
    ]
    return [*wide, jnp.pad(documents, ((0, 0), (0, more)), mode="edge")]


def sums(forget_bhi: jax.Array, document_bi: jax.Array) -> jax.Array:
    """Of a block: the log forget gates of a position's document up to and including it, f32 [b, h, i]. As a product,
    so that nothing cancels."""
    seen = _seen(document_bi).astype(jnp.float32)
    return jnp.einsum("bij,bhj->bhi", seen, forget_bhi, precision="highest")


def _seen(document_bi: jax.Array) -> jax.Array:
    """bool [b, i, j]: positions j of the same document, not after i."""
    i = jnp.arange(document_bi.shape[1])
    return (document_bi[:, :, None] == document_bi[:, None]) & (i[:, None] >= i[None])[None]


def mlstm(parts: Parts, state: State, size: int) -> tuple[jax.Array, State]:
    """Outputs f32 [b, h, t, v] and the state after the last position, in blocks of `size` positions."""
    *rest, documents = padded(parts, size)
    b, t = parts[-1].shape

    def blocks(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(*a.shape[:2], -1, size, *a.shape[3:]), 2, 0)

    one = jax.checkpoint(_block, prevent_cse=False)
    start = (*state, jnp.zeros(b, jnp.int32))
    inputs = (*(blocks(a) for a in rest), documents.reshape(b, -1, size).swapaxes(0, 1))
    (*state, _), h = jax.lax.scan(one, start, inputs)
    h = jnp.moveaxis(h, 0, 2)
    return h.reshape(*h.shape[:2], -1, h.shape[-1])[:, :, :t], tuple(state)


def _block(carry: tuple, parts: Parts) -> tuple[tuple, jax.Array]:
    """One block: state and document at its end, and outputs f32 [b, h, i, v]."""
    (c_bhkv, n_bhk, m_bh, before_b), (q, k, v, gate, forget, document) = carry, parts
    total, seen = sums(forget, document), _seen(document)[:, None]
    log = total[..., None] - total[..., None, :] + gate[..., None, :]
    log = jnp.where(jnp.broadcast_to(seen, log.shape), log, NEGATIVE)
    goes_on = jnp.broadcast_to((document == before_b[:, None])[:, None], total.shape)
    old = total + jnp.where(goes_on, m_bh[..., None], 0.0)
    m = jnp.maximum(old, log.max(-1))

    q = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    weights = jnp.einsum("bhik,bhjk->bhij", q, k) * jnp.exp(log - m[..., None])
    share = jnp.where(goes_on, jnp.exp(old - m), 0.0)
    above = jnp.einsum("bhij,bhjv->bhiv", weights, v) + share[..., None] * jnp.einsum("bhik,bhkv->bhiv", q, c_bhkv)
    below = weights.sum(-1) + share * jnp.einsum("bhik,bhk->bhi", q, n_bhk)
    h = above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)[..., None]

    last = jnp.broadcast_to((document == document[:, -1:])[:, None], total.shape)
    enters = jnp.where(last, total[..., -1:] - total + gate, NEGATIVE)
    new = jnp.maximum(old[..., -1], enters.max(-1))
    keep = jnp.where(goes_on[..., -1], jnp.exp(old[..., -1] - new), 0.0)
    fed = jnp.exp(enters - new[..., None])[..., None] * k
    c_bhkv = keep[..., None, None] * c_bhkv + jnp.einsum("bhik,bhiv->bhkv", fed, v)
    return (c_bhkv, keep[..., None] * n_bhk + fed.sum(2), new, document[:, -1]), h
