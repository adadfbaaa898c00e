"""A table of many learned values of which every position reads few, found by product keys (Lample et al., 2019;
Memory Layers at Scale, Berges et al., 2024, whose "Memory+" this is).

Dimension letters besides those of `atom_jax.typing`: h heads, k size of a query, i its halves, m keys per half,
n entries that a head reads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.nn.blocks import in_blocks
from atom_jax.params import ParamSpec, normal, zeros

# Keys per half (their square is the size of the table), heads, entries that each reads, and the size of a query.
KEYS, HEADS, NEAREST, SIZE = 128, 4, 32, 128
# Positions whose values exist at once.
BLOCK = 256


def layer_spec(
    d: int, std: float = 0.02, out_scale: float = 1.0, keys: int = KEYS, heads: int = HEADS
) -> dict[str, ParamSpec]:
    """Parameters of `layer` for model width d: a table of keys x keys values."""
    return {
        "q": ParamSpec((d, heads, SIZE), ("embed", "heads", None), normal(std)),
        "q_bias": ParamSpec((heads, SIZE), ("heads", None), zeros),
        "keys": ParamSpec((heads, 2, keys, SIZE // 2), ("heads", None, None, None), normal(SIZE**-0.5)),
        "values": ParamSpec((keys * keys, d), (None, "embed"), normal(keys**-1.0)),
        "gate": ParamSpec((d, d), ("embed", None), normal(std)),
        "gate_bias": ParamSpec((d,), (None,), zeros),
        "o": ParamSpec((d, d), (None, "embed"), normal(std * out_scale)),
        "o_bias": ParamSpec((d,), (None,), zeros),
        "open": ParamSpec((d,), ("embed",), normal(std)),
        "open_bias": ParamSpec((), (), zeros),
    }


def layer(p: dict[str, Any], x_btd: jax.Array, nearest: int = NEAREST) -> jax.Array:
    """What the table says of each position by itself, [b, t, d] in the dtype of x: o(y * silu(gate(x))), y being what
    `look_up` finds, times a sigmoid of the position (which the official code has as an option).

    Differs from the official code in that every layer has a table of its own, learned at the rate of everything else
    (there: one table for all layers, at 0.001), and in how parameters begin (there: keys uniform, values of variance
    1 / d).
    """
    f32 = lambda name: p[name].astype(jnp.float32)  # noqa: E731
    y = look_up(p, x_btd, nearest).astype(x_btd.dtype)
    gate = (
        jnp.einsum("btd,de->bte", x_btd, p["gate"], preferred_element_type=jnp.float32) + f32("gate_bias")[None, None]
    )
    y = y * jax.nn.silu(gate).astype(x_btd.dtype)
    y = jnp.einsum("bte,ed->btd", y, p["o"], preferred_element_type=jnp.float32) + f32("o_bias")[None, None]
    open_bt = jnp.einsum("btd,d->bt", x_btd, p["open"], preferred_element_type=jnp.float32) + f32("open_bias")
    return (y * jax.nn.sigmoid(open_bt)[..., None]).astype(x_btd.dtype)


def look_up(p: dict[str, Any], x_btd: jax.Array, nearest: int = NEAREST) -> jax.Array:
    """f32 [b, t, d], the sum over heads of the `nearest` values by `find`, weighted by a softmax."""
    b, t, _ = x_btd.shape
    q_bthk = jnp.einsum("btd,dhk->bthk", x_btd, p["q"], preferred_element_type=jnp.float32)
    index, score = find(q_bthk + p["q_bias"].astype(jnp.float32)[None, None], p["keys"], nearest)
    both = (x.reshape(b * t, -1) for x in (index, jax.nn.softmax(score, axis=-1)))
    return _gathered(p["values"], *both).reshape(b, t, -1)


def find(q_bthk: jax.Array, keys_himk: jax.Array, nearest: int) -> tuple[jax.Array, jax.Array]:
    """i32 and f32 [b, t, h, n], the entries whose keys have the largest products with queries, largest first, and
    these products: entry i * m + j has the two keys i and j beside each other. Exact: the best pairs are among those
    of the best halves."""
    m = keys_himk.shape[2]
    halves = q_bthk.astype(jnp.float32).reshape(*q_bthk.shape[:3], 2, -1)
    scores = jnp.einsum("bthik,himk->bthim", halves, keys_himk.astype(jnp.float32))
    top, at = jax.lax.top_k(scores, min(nearest, m))
    pairs = (top[..., 0, :, None] + top[..., 1, None, :]).reshape(*q_bthk.shape[:3], -1)
    index = (at[..., 0, :, None] * m + at[..., 1, None, :]).reshape(pairs.shape)
    best, which = jax.lax.top_k(pairs, min(nearest, pairs.shape[-1]))
    return jnp.take_along_axis(index, which, axis=-1), best


def _gathered(values_ed: jax.Array, index_tn: jax.Array, weight_tn: jax.Array) -> jax.Array:
    """f32 [t, d], weighted sums of values; those of few positions exist at once."""
    t = len(index_tn)
    size = min(BLOCK, t)

    @jax.checkpoint
    def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, weight = part
        return jnp.einsum("tn,tnd->td", weight, values_ed[index].astype(jnp.float32))

    parts = (in_blocks(x, 0, size) for x in (index_tn, weight_tn))
    return jax.lax.map(some, tuple(parts)).reshape(-1, values_ed.shape[1])[:t]
