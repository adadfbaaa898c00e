"""Vision transformers (Dosovitskiy et al., 2021): images as patches, and pre-norm blocks whose queries see both ways.

`mixed` and `fed` are the halves of a block, so that tokens can be merged or left out between them; a bias on every
key (log of the patches that it stands for) keeps merged tokens in proportion. Weights of timm's and CLIP's blocks
need only be reshaped.

Dimension letters: those of `atom_jax.typing`; p patches of an image, c channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens, attend
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm
from atom_jax.params import ParamSpec, Tree, normal, ones, zeros
from atom_jax.sharding import constrain
from atom_jax.typing import AtomError


def patches(image_bhwc: jax.Array, size: int) -> jax.Array:
    """Squares of size x size pixels, [b, p, size * size * c], row after row; inside one by row, column, channel.

    Raises AtomError for images that squares of this size do not fill.
    """
    b, height, width, c = image_bhwc.shape
    if height % size or width % size:
        raise AtomError(f"patches of {size} x {size} do not fill an image of {height} x {width}")
    x = image_bhwc.reshape(b, height // size, size, width // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * c)


def unpatched(x_bpc: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """The inverse of `patches`: images [b, height, width, c]."""
    x = x_bpc.reshape(x_bpc.shape[0], height // size, width // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x_bpc.shape[0], height, width, -1)


def everywhere(b: int, t: int) -> Tokens:
    """Where t tokens of b rows stand that all see one another."""
    return Tokens(jnp.zeros((b, t), jnp.int32), jnp.ones((b, t), jnp.int32))


def affine_spec(inputs: int, outputs: int) -> Tree:
    """Parameters of `affine`."""
    w = ParamSpec((inputs, outputs), (None, "embed"), normal(inputs**-0.5))
    return {"w": w, "b": ParamSpec((outputs,), (None,), zeros)}


def affine(p: Tree, x: jax.Array) -> jax.Array:
    """x w + b over the last axis, in the dtype of x."""
    return _shifted(project(x, p["w"]), p["b"])


def norm_spec(d: int) -> Tree:
    """Parameters of `norm`."""
    return {"weight": ParamSpec((d,), (None,), ones), "bias": ParamSpec((d,), (None,), zeros)}


def norm(p: Tree, x: jax.Array, eps: float) -> jax.Array:
    """`layer_norm` with parameters as `norm_spec` describes."""
    return layer_norm(x, p["weight"], p["bias"], eps)


def block_spec(d: int, f: int, heads: int, out_scale: float = 1.0) -> Tree:
    """Parameters of `block` of width d with `heads` heads of size d / heads and f hidden units.

    Raises AtomError where the heads do not divide the width.
    """
    if d % heads:
        raise AtomError(f"heads: {heads} do not divide the width {d}")
    size = (heads, d // heads)
    return {
        "attn_norm": norm_spec(d),
        "qkv": ParamSpec((d, 3, *size), ("embed", "parts", "heads", None), normal(d**-0.5)),
        "qkv_bias": ParamSpec((3, *size), ("parts", "heads", None), zeros),
        "o": ParamSpec((*size, d), ("heads", None, "embed"), normal(out_scale * d**-0.5)),
        "o_bias": ParamSpec((d,), (None,), zeros),
        "mlp_norm": norm_spec(d),
        "up": ParamSpec((d, f), ("embed", "mlp"), normal(d**-0.5)),
        "up_bias": ParamSpec((f,), ("mlp",), zeros),
        "down": ParamSpec((f, d), ("mlp", "embed"), normal(out_scale * f**-0.5)),
        "down_bias": ParamSpec((d,), (None,), zeros),
    }


@struct.dataclass
class Mixed:
    """What the attention half of a block gives: x [b, t, d], and the queries and keys [b, h, t, k] of all heads."""

    x: jax.Array
    q: jax.Array
    k: jax.Array


def mixed(p: Tree, x_btd: jax.Array, tokens: Tokens, eps: float, bias_bt: jax.Array | None = None) -> Mixed:
    """x + attention(norm(x)), the first half of a block.

    Args:
      tokens: a query sees keys of its own segment whose positions are not after its own; `everywhere`: all.
      bias_bt: f32, added to the scores of every key; None: nothing.
    """
    qkv = project(norm(p["attn_norm"], x_btd, eps), p["qkv"])
    q, k, v = jnp.moveaxis(_shifted(qkv, p["qkv_bias"]), (2, 3), (0, 2))
    q, k, v = (constrain(a, "batch", "heads", None, None) for a in (q, k, v))
    bias_bht = None if bias_bt is None else jnp.broadcast_to(bias_bt[:, None], k.shape[:3])
    out = attend(q[:, :, None], k, v, tokens, tokens, bias_bhs=bias_bht)[:, :, 0]
    out = project(out.transpose(0, 2, 1, 3), p["o"], inputs=2)
    return Mixed(x_btd + _shifted(out, p["o_bias"]), q, k)


def fed(p: Tree, x_btd: jax.Array, eps: float) -> jax.Array:
    """x + mlp(norm(x)) with an exact GELU, the second half of a block."""
    hidden = _shifted(project(norm(p["mlp_norm"], x_btd, eps), p["up"]), p["up_bias"])
    hidden = constrain(jax.nn.gelu(hidden, approximate=False), "batch", None, "mlp")
    return x_btd + _shifted(project(hidden, p["down"]), p["down_bias"])


def block(p: Tree, x_btd: jax.Array, tokens: Tokens, eps: float, bias_bt: jax.Array | None = None) -> jax.Array:
    """One layer, [b, t, d] to [b, t, d] in the dtype of x; see `mixed` for the arguments."""
    return fed(p, mixed(p, x_btd, tokens, eps, bias_bt).x, eps)


def blocks(p: Tree, x_btd: jax.Array, tokens: Tokens, eps: float) -> jax.Array:
    """Layers one after another; p: parameters of `block`, stacked (`params.stack`)."""
    return jax.lax.scan(lambda x, layer: (block(layer, x, tokens, eps), None), x_btd, p)[0]


def _shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias over the last axes."""
    return x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
