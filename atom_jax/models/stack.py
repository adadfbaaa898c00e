"""Isotropic stacks: layers spelled by a layout string, the parts that hierarchical models are made of.

A layout such as "T1m4" lists runs of equal layers (H-Net, Hwang et al. 2025, section 2 and its released code):

    m  Mamba-2                 M  Mamba-2, then SwiGLU
    t  causal attention        T  causal attention, then SwiGLU
    x  the post-norm Transformer-XL layer of dynamic token pooling (attention with relative positions, then GELU MLP)

m, M, t and T are pre-norm with a residual carried in float32; a stack of them ends with a norm.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.memory import Call
from atom_jax.kvcache.window import WindowLayer
from atom_jax.nn import relative, rope
from atom_jax.nn.attention import Tokens
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.nn.self_attention import self_attend
from atom_jax.nn.ssd import Mamba2Config, MambaState, mamba2, mamba2_spec
from atom_jax.params import ParamSpec, Tree, normal, ones
from atom_jax.sharding import constrain, share
from atom_jax.typing import AtomError

LETTERS = "mMtTx"


@dataclasses.dataclass(frozen=True)
class Width:
    """Sizes of the layers of one stage.

    d: model width; f: MLP width (rounded up to a multiple of 128 for SwiGLU, as released); heads; rotary: channels of
    every head that RoPE turns; window: a query sees so many keys before its own (-1: all); qk_norm: RMSNorm on every
    query and key head.
    """

    d: int
    f: int
    heads: int
    rotary: int
    window: int
    eps: float
    ssm: Mamba2Config
    std: float = 0.02
    qk_norm: bool = False

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.d // self.heads

    def slides(self, letter: str) -> int | None:
        """How many positions a query of such a layer sees, its own included; None: all before it."""
        return None if letter == "x" or self.window < 0 else self.window + 1


@dataclasses.dataclass
class Context:
    """What the layers of one call share.

    tokens: where the positions stand. length: i32 [b] positions that the caches hold already, or None without caches.
    fresh: nothing is stored yet. biases: of the relative attention ("x" layers), or None.
    """

    tokens: Tokens
    length: jax.Array | None = None
    fresh: bool = False
    biases: Any = None
    remat: bool = False


def parse(layout: str) -> tuple[tuple[str, int], ...]:
    """("T", 1), ("m", 4) for "T1m4"; AtomError for anything else than letters of LETTERS with counts below 10000."""
    if not re.fullmatch(rf"([{LETTERS}]\d{{1,4}})*", layout):
        raise AtomError(f"layout {layout!r}: expected letters of {LETTERS!r}, each with a count, such as 'T1m4'")
    return tuple((letter, int(n)) for letter, n in re.findall(r"(\w)(\d+)", layout) if int(n))


def height(layout: str) -> int:
    """Number of additions to the residual stream."""
    return sum(n * (2 if letter in "MTx" else 1) for letter, n in parse(layout))


def stack_spec(layout: str, width: Width, out_scale: float) -> Tree:
    """Parameters: one stacked tree per run ("0", "1", ...), and the final norm.

    out_scale: factor on the initial values of the matrices that write to the residual stream.
    """
    tree = {str(i): params.stack(_layer_spec(letter, width, out_scale), n)
            for i, (letter, n) in enumerate(parse(layout))}  # fmt: skip
    return tree if "x" in layout else tree | {"norm": ParamSpec((width.d,), (None,), ones)}


def _layer_spec(letter: str, width: Width, out_scale: float) -> Tree:
    d, n, k = width.d, width.heads, width.head_dim
    if letter == "x":
        return relative.relative_spec(d, n, width.f)
    std = width.std
    if letter in "mM":
        mixer = mamba2_spec(d, width.ssm, out_scale)
    else:
        mixer = {
            "qkv": ParamSpec((d, 3, n, k), ("embed", "parts", "heads", None), normal(std)),
            "o": ParamSpec((n, k, d), ("heads", None, "embed"), normal(std * out_scale)),
        }
        if width.qk_norm:
            mixer |= {name: ParamSpec((k,), (None,), ones) for name in ("q_norm", "k_norm")}
    layer = {"norm1": ParamSpec((d,), (None,), ones), "mixer": mixer}
    if letter in "MT":
        f = -(-width.f // 128) * 128
        layer["norm2"] = ParamSpec((d,), (None,), ones)
        layer["mlp"] = {
            "fc1": ParamSpec((d, 2, f), ("embed", "parts", "mlp"), normal(std)),
            "fc2": ParamSpec((f, d), ("mlp", "embed"), normal(std * out_scale)),
        }
    return layer


def init_states(layout: str, width: Width, b: int, capacity: int, dtype: Any) -> tuple:
    """Empty memory of every run, stacked over its layers, with room for `capacity` positions."""
    out = []
    for letter, n in parse(layout):
        if letter in "mM":
            state = MambaState.empty(b, width.d, width.ssm, dtype)
        else:
            sizes = (b, width.heads, capacity, width.head_dim, dtype)
            window = width.slides(letter)
            state = DenseLayer.empty(*sizes) if window is None else WindowLayer.empty(*sizes, window)
        out.append(jax.tree.map(lambda x, n=n: jnp.zeros((n, *x.shape), x.dtype), state))
    return tuple(out)


def apply_stack(
    p: Tree, layout: str, width: Width, x_btd: jax.Array, states: tuple | None, context: Context
) -> tuple[jax.Array, tuple | None]:
    """Runs the layers over x [b, t, d]; the result has its dtype. `states` is None without caches."""
    dtype, new = x_btd.dtype, []
    if "x" not in layout:
        x_btd = x_btd.astype(jnp.float32)
    tables = None
    if width.rotary and any(letter in "tT" for letter, _ in parse(layout)):
        tables = rope.tables(context.tokens.positions, width.rotary, 10000.0)
    for i, (letter, _) in enumerate(parse(layout)):

        def layer(x: jax.Array, inputs: Any, letter: str = letter) -> tuple[jax.Array, Any]:
            return _layer(letter, inputs[0], x, inputs[1], width, context, tables, dtype)

        run, state = p[str(i)], None if states is None else states[i]
        x_btd, state = run_layers(layer, run, x_btd, state, context.remat)
        new.append(state)
    if "norm" in p:
        x_btd = rms_norm(x_btd, p["norm"], width.eps)
    x_btd = constrain(x_btd.astype(dtype), "batch", "length", None)
    return x_btd, None if states is None else tuple(new)


def run_layers(layer: Any, run: Any, x: jax.Array, state: Any, remat: bool) -> tuple[jax.Array, Any]:
    """A run of equal layers whose parameters are stacked (they are scanned) or a tuple (unrolled).

    layer: (x, (parameters, state or None)) -> (x, state). Returns x after all, and the states in the same form."""
    if isinstance(run, tuple):
        new = []
        for i, one in enumerate(run):
            x, s = layer(x, (one, None if state is None else state[i]))
            new.append(s)
        return x, None if state is None else tuple(new)
    layer = jax.checkpoint(layer) if remat else layer
    if jax.tree.leaves(run)[0].shape[0] == 1:
        x, s = layer(x, jax.tree.map(lambda a: a[0], (run, state)))
        return x, jax.tree.map(lambda a: a[None], s)
    return jax.lax.scan(layer, x, (run, state))


def _layer(
    letter: str, p: Tree, x: jax.Array, state: Any, width: Width, context: Context, tables: Any, dtype: Any
) -> tuple[jax.Array, Any]:
    p = params.cast(p, dtype) if letter not in "mM" else p
    if letter == "x":
        return _relative(p, x, state, context)
    y = constrain(rms_norm(x, p["norm1"], width.eps).astype(dtype), "batch", "length", None)
    if letter in "mM":
        y, state = mamba2(p["mixer"], y, context.tokens, state, width.ssm)
    else:
        y, state = _attention(p["mixer"], y, state, width, context, tables)
    x = x + share(y).astype(x.dtype)
    if letter in "MT":
        y = constrain(rms_norm(x, p["norm2"], width.eps).astype(dtype), "batch", "length", None)
        up, gate = (both[:, :, 0] for both in jnp.split(project(y, p["mlp"]["fc1"]), 2, axis=2))
        y = project(constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp"), p["mlp"]["fc2"])
        x = x + share(y).astype(x.dtype)
    return constrain(x, "batch", "stored_length", None), state


def _attention(
    p: Tree, y: jax.Array, state: Any, width: Width, context: Context, tables: Any
) -> tuple[jax.Array, Any]:
    qkv = constrain(project(y, p["qkv"]), "batch", "length", None, "heads", None)
    q, k, v = (a[:, :, 0] for a in jnp.split(qkv, 3, axis=2))
    if width.qk_norm:
        q, k = rms_norm(q, p["q_norm"], width.eps), rms_norm(k, p["k_norm"], width.eps)
    if tables is not None:
        r = width.rotary
        q, k = (jnp.concatenate([rope.rotate(a[..., :r], *tables), a[..., r:]], axis=-1) for a in (q, k))
    q = q.transpose(0, 2, 1, 3)[:, :, None]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    window = width.slides("t")
    if state is None:
        out = self_attend(q, k, v, context.tokens, window=window)
    else:
        call = Call(q, k, v, context.tokens, context.length, window=window, fresh=context.fresh)
        out, state = state.extend(call)
    out = out[:, :, 0].transpose(0, 2, 1, 3)
    return project(out, p["o"], inputs=2), state


def _relative(p: Tree, x: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    return relative.relative_layer(p, context.biases, x, context.tokens, state, context.length)
