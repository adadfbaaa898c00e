"""Transformer-XL layers: relative positions, norms after the residual (Dai et al., 2019; as Nawrot et al., 2023,
use them in dynamic token pooling).

A query at position i scores a key at position j by ((q + r_w) k + (q + r_r) R w(i - j)) / sqrt(k), where
w(x) = [sin(x f) | cos(x f)] for d / 2 frequencies f. The angle addition theorem splits w(i - j) into a factor of the
query and one of the key, so that the second term is a product of two matrices too: nothing is shifted or gathered,
and one more token costs no projection of all the distances.

Dimension letters: those of `atom_jax.typing`.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.nn.attention import NEGATIVE, Tokens, block_size, mask
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm
from atom_jax.params import ParamSpec, Tree, normal, zeros
from atom_jax.sharding import constrain
from atom_jax.typing import AtomError

BASE = 10000.0


class KeyValues(Protocol):
    """A memory of keys and values [b, h, s, k] whose slot s holds the token at position s."""

    k: jax.Array
    v: jax.Array

    def write(self, k_bhtk: jax.Array, v_bhtk: jax.Array, start_b: jax.Array) -> Any:
        """The memory with t tokens of every row added from slot start_b on."""


def biases_spec(d: int, n_heads: int) -> dict[str, ParamSpec]:
    """The two biases [h, k] on queries, which all layers of a model share."""
    shape = (n_heads, _head_size(d, n_heads))
    return {name: ParamSpec(shape, ("heads", None), normal(0.02)) for name in ("r_w_bias", "r_r_bias")}


def relative_spec(d: int, n_heads: int, f: int) -> Tree:
    """Parameters of one `relative_layer` of width d with n_heads heads of size d / n_heads and f hidden units.

    The published layer also has a bias on the projection of positions: it adds the same to all scores of a query,
    which the softmax ignores, so there is none here. Raises AtomError where the widths do not divide.
    """
    heads = (n_heads, _head_size(d, n_heads))
    return {
        "qkv": ParamSpec((d, 3, *heads), ("embed", "parts", "heads", None), normal(0.02)),
        "qkv_bias": ParamSpec((3, *heads), ("parts", "heads", None), zeros),
        "r": ParamSpec((d, *heads), ("embed", "heads", None), normal(0.02)),
        "o": ParamSpec((*heads, d), ("heads", None, "embed"), normal(0.02)),
        "o_bias": ParamSpec((d,), (None,), zeros),
        "norm": _norm_spec(d),
        "up": ParamSpec((d, f), ("embed", "mlp"), normal(0.02)),
        "up_bias": ParamSpec((f,), ("mlp",), zeros),
        "down": ParamSpec((f, d), ("mlp", "embed"), normal(0.02)),
        "down_bias": ParamSpec((d,), (None,), zeros),
        "mlp_norm": _norm_spec(d),
    }


def _head_size(d: int, n_heads: int) -> int:
    if d % n_heads or d % 2:
        raise AtomError(f"relative attention: width {d} is not even and a multiple of n_heads {n_heads}")
    return d // n_heads


def _norm_spec(d: int) -> dict[str, ParamSpec]:
    def near_one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return 1 + normal(0.02)(key, shape, dtype)

    return {"weight": ParamSpec((d,), (None,), near_one), "bias": ParamSpec((d,), (None,), zeros)}


def relative_layer(
    p: Tree,
    biases: dict[str, jax.Array],
    x_btd: jax.Array,
    tokens: Tokens,
    cache: KeyValues | None = None,
    length_b: jax.Array | None = None,
) -> tuple[jax.Array, KeyValues | None]:
    """norm(x + attention(x)), then norm(x + mlp(x)) with an exact GELU: [b, t, d] in the dtype of x.

    Args:
      p, biases: as `relative_spec` and `biases_spec` describe. x_btd: inputs; outputs at padding are meaningless.
      tokens: where the inputs stand; a query sees keys of its own segment that are not after it.
      cache: keys and values of earlier calls. Then tokens.positions are slots of the cache, every row is one
        document, and padding comes after the real positions.
      length_b: i32 [b] tokens that the cache holds before this call; needed with a cache only.
    Returns: the outputs, and the cache with these tokens (None for None).
    """
    qkv = project(x_btd, p["qkv"])
    qkv = qkv + jnp.broadcast_to(p["qkv_bias"].astype(x_btd.dtype), qkv.shape)
    q, k, v = (constrain(a[:, :, 0], "batch", None, "heads", None) for a in jnp.split(qkv, 3, axis=2))
    k, v, keys = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), tokens
    if cache is not None:
        cache = cache.write(k, v, length_b)
        k, v = cache.k, cache.v
        held_b = length_b + jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)
        slots = jnp.broadcast_to(jnp.arange(k.shape[2])[None], (k.shape[0], k.shape[2]))
        keys = Tokens(slots, (slots < held_b[:, None]).astype(jnp.int32))
        tokens = Tokens(tokens.positions, jnp.ones_like(tokens.segments))
    out = relative_attention(p["r"], biases, q, k, v, tokens, keys)
    x = _add_and_norm(x_btd, project(out, p["o"], inputs=2), p["o_bias"], p["norm"])
    hidden = project(x, p["up"])
    hidden = jax.nn.gelu(hidden + jnp.broadcast_to(p["up_bias"].astype(x.dtype), hidden.shape), approximate=False)
    x = _add_and_norm(x, project(constrain(hidden, "batch", None, "mlp"), p["down"]), p["down_bias"], p["mlp_norm"])
    return constrain(x, "batch", None, None), cache


def _add_and_norm(x: jax.Array, y: jax.Array, bias_d: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
    x = x + y + jnp.broadcast_to(bias_d.astype(x.dtype), x.shape)
    return layer_norm(x, norm["weight"], norm["bias"])


def relative_attention(
    r_dhk: jax.Array,
    biases: dict[str, jax.Array],
    q_bthk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    q: Tokens,
    k: Tokens,
) -> jax.Array:
    """Softmax attention with the scores described above; float32 softmax, memory linear in t and s.

    Args:
      r_dhk: R, which projects the waves of d / 2 frequencies to a vector per head. q_bthk, k_bhsk, v_bhsk: queries,
      keys and values. q, k: where they stand; a query sees keys of its own segment that are not after it.
    Returns: [b, t, h, k] in the dtype of the queries. Rows that see no key return finite, meaningless values.
    """
    b, t, h, size = q_bthk.shape

    def tile(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_bthk, positions, segments = inputs
        return _tile(r_dhk, biases, q_bthk, k_bhsk, v_bhsk, Tokens(positions, segments), k)

    block = block_size(k_bhsk.shape[2])
    # Who sees whom is the same in every layer: a scan over layers would find out once, and keep it as [t, s].
    inputs = jax.lax.optimization_barrier((q_bthk, q.positions, q.segments))
    if t <= block:
        return tile(inputs)
    blocks = tuple(in_blocks(x, 1, block) for x in inputs)
    # Only the outputs of a tile are kept for the gradient; its [b, h, block, s] scores are computed again.
    out = jax.lax.map(jax.checkpoint(tile, prevent_cse=False), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, h, size)[:, :t]


def _tile(r_dhk, biases, q_bthk, k_bhsk, v_bhsk, q: Tokens, k: Tokens) -> jax.Array:
    dtype, d = q_bthk.dtype, r_dhk.shape[0]
    with_content, with_position = (
        q_bthk + jnp.broadcast_to(biases[name].astype(dtype), q_bthk.shape) for name in ("r_w_bias", "r_r_bias")
    )
    scores = jnp.einsum("bthk,bhsk->bhts", with_content, k_bhsk, preferred_element_type=jnp.float32)
    # Counted from the tile's first query: rounding an angle then costs as little as if it were that of a distance.
    origin = q.positions[:, :1]
    sin_q, cos_q = (jnp.expand_dims(x, 2) for x in _waves(q.positions - origin, d))
    a, b = jnp.split(jnp.einsum("bthk,dhk->bthd", with_position, r_dhk.astype(dtype)).astype(jnp.float32), 2, axis=-1)
    turned_bthd = jnp.concatenate([b * sin_q - a * cos_q, a * sin_q + b * cos_q], axis=-1).astype(dtype)
    waves_bsd = jnp.concatenate(_waves(k.positions - origin, d), axis=-1).astype(dtype)
    scores = scores + jnp.einsum("bthd,bsd->bhts", turned_bthd, waves_bsd, preferred_element_type=jnp.float32)
    seen = jnp.broadcast_to(mask(q, k, None)[:, None], scores.shape)
    weights = jax.nn.softmax(jnp.where(seen, scores * q_bthk.shape[-1] ** -0.5, NEGATIVE), axis=-1)
    return jnp.einsum("bhts,bhsk->bthk", weights.astype(v_bhsk.dtype), v_bhsk).astype(dtype)


def _waves(positions_bt: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines, f32 [b, t, d / 2] each, of positions times frequencies 10000^(-2 i / d)."""
    frequency = jnp.asarray(BASE ** (-np.arange(0, d, 2) / d), jnp.float32)
    angle = positions_bt.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.sin(angle), jnp.cos(angle)
