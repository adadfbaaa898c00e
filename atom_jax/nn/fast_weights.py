"""Fast weights: a matrix per head that is written to while a sequence is read (Schlag et al., 2021).

Dimension letters besides those of `atom_jax.typing`: h heads, k size of keys and queries, v of values, i and j
positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from atom_jax.nn.attention import Tokens
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.conv import documents
from atom_jax.params import ParamSpec, normal

# Positions that are read at once; changes speed and memory, not results.
CHUNK = 64


def fast_weights(
    q_bthk: jax.Array, k_bthk: jax.Array, v_bthv: jax.Array, beta_bth: jax.Array | None, document_bt: jax.Array,
    w_bhvk: jax.Array, chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """At every position W <- W + beta (v - W k) k^T (the delta rule), and y = W q with the new W.

    Args:
      beta_bth: how much of what W says of a key is replaced, f32; 0 leaves W as it is. None: W <- W + v k^T (the sum
        rule), which keys of 0 leave as it is.
      document_bt: as of `conv.documents`: W starts from 0 where the number grows; 0 goes on from w_bhvk.
    A chunk's positions are read together: what they write depends on what earlier ones wrote, which a triangular
    system solves. Everything in float32. Returns y [b, t, h, v] and W [b, h, v, k] after the last position.
    """
    t = q_bthk.shape[1]
    size = min(chunk, t)

    beta = jnp.ones(q_bthk.shape[:3]) if beta_bth is None else beta_bth
    read = (in_blocks(x.astype(jnp.float32), 1, size) for x in (q_bthk, k_bthk, v_bthv, beta))
    parts = (*read, in_blocks(document_bt, 1, size, "edge"))

    def one(carry: tuple[jax.Array, jax.Array], part: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        w, before_b = carry
        q, k, v, beta, document = part
        same = (document[:, :, None] == document[:, None])[:, None]
        goes_on = (document == before_b[:, None]).astype(jnp.float32)[..., None, None]
        if beta_bth is None:
            new = v
        else:
            each = jnp.where(same, jnp.einsum("bihk,bjhk->bhij", k, k), 0.0) * beta.transpose(0, 2, 1)[..., None]
            wanted = beta[..., None] * (v - goes_on * jnp.einsum("bihk,bhvk->bihv", k, w))
            lower = jnp.tril(each, -1) + jnp.eye(size)[None, None]
            new = solve_triangular(lower, wanted.transpose(0, 2, 1, 3), lower=True, unit_diagonal=True)
            new = new.transpose(0, 2, 1, 3)
        seen = jnp.tril(jnp.where(same, jnp.einsum("bihk,bjhk->bhij", q, k), 0.0))
        y = goes_on * jnp.einsum("bihk,bhvk->bihv", q, w) + jnp.einsum("bhij,bjhv->bihv", seen, new)
        last = document[:, -1]
        kept = jnp.where((document == last[:, None])[..., None, None], k, 0.0)
        w = jnp.where((last == before_b)[:, None, None, None], w, 0.0) + jnp.einsum("bjhv,bjhk->bhvk", new, kept)
        return (w, last), y

    first = (w_bhvk.astype(jnp.float32), jnp.zeros(q_bthk.shape[0], jnp.int32))
    (w_bhvk, _), y = jax.lax.scan(one, first, parts)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :t], w_bhvk


def layer_spec(d: int, heads: int, std: float = 0.02, out_scale: float = 1.0) -> dict[str, ParamSpec]:
    """Parameters of `layer` for model width d, which the heads divide."""
    k = d // heads
    return {
        "qkv": ParamSpec((d, 3, heads, k), ("embed", "parts", "heads", None), normal(std)),
        "beta": ParamSpec((d, heads), ("embed", "heads"), normal(std)),
        "o": ParamSpec((heads, k, d), ("heads", None, "embed"), normal(std * out_scale)),
    }


def layer(p: dict[str, Any], x_btd: jax.Array, tokens: Tokens, w_bhvk: Any) -> tuple[jax.Array, Any]:
    """A layer of fast weights by the delta rule, [b, t, d] to [b, t, d] in the dtype of x: keys and queries are
    elu + 1 over their sums (over 1e-6, where these are less), beta is a sigmoid. W starts anew with every document;
    padding changes nothing.

    w_bhvk: what earlier calls left, f32 [b, h, v, k], or None. Returns the outputs, and W (None for None).
    """
    real_bt = tokens.segments > 0
    qkv = jnp.einsum("btd,dchk->cbthk", x_btd, p["qkv"], preferred_element_type=jnp.float32)
    q, k = (jax.nn.elu(x) + 1.0 for x in (qkv[0], qkv[1]))
    q, k = (x / jnp.maximum(x.sum(-1, keepdims=True), 1e-6) for x in (q, k))
    beta = jax.nn.sigmoid(jnp.einsum("btd,dh->bth", x_btd, p["beta"], preferred_element_type=jnp.float32))
    beta = jnp.where(real_bt[..., None], beta, 0.0)
    size = p["o"].shape[1]
    old = jnp.zeros((x_btd.shape[0], p["o"].shape[0], size, size)) if w_bhvk is None else w_bhvk
    y_bthv, new = fast_weights(q, k, qkv[2], beta, documents(tokens), old)
    out = jnp.einsum("bthv,hvd->btd", y_bthv.astype(x_btd.dtype), p["o"].astype(x_btd.dtype))
    return out, None if w_bhvk is None else new
