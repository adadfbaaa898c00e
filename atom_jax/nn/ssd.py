"""Mamba-2: a state-space layer with one decay per head (Dao & Gu, 2024, "Transformers are SSMs").

Dimension letters besides those of `atom_jax.typing`: e inner width, h heads of size k (e = h * k), n state size,
c channels of the convolution (e + 2n), i and j positions of one block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.nn.attention import Tokens
from atom_jax.nn.conv import causal_conv, documents
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, normal, ones
from atom_jax.sharding import constrain, split, tensor_shards
from atom_jax.typing import AtomError
from pallas_kernels.ssd_chunk.api import ssd_chunk

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 layer; the defaults are the published ones."""

    d_state: int = 128
    # Inputs that the convolution sees, the newest included.
    d_conv: int = 4
    # Inner width over model width.
    expand: int = 2
    head_dim: int = 64
    # Positions per block of the matrix form; changes speed and memory, not results.
    chunk: int = 256

    def __post_init__(self):
        config.check(self, **dict.fromkeys(("d_state", "d_conv", "expand", "head_dim", "chunk"), (1, 2**20)))

    def sizes(self, d: int) -> tuple[int, int, int]:
        """Inner width e, heads h and convolution channels c for model width d."""
        e = self.expand * d
        if e % self.head_dim:
            raise AtomError(
                f"head_dim {self.head_dim} does not divide the inner width {e} (expand {self.expand} x {d})"
            )
        return e, e // self.head_dim, e + 2 * self.d_state


@struct.dataclass
class MambaState:
    """What a layer remembers of each row.

    conv: [b, d_conv - 1, c] the latest inputs of the convolution; s: f32 [b, h, k, n] the state of every head.
    """

    conv: jax.Array
    s: jax.Array

    @classmethod
    def empty(cls, b: int, d: int, cfg: Mamba2Config, dtype: Any) -> MambaState:
        """Before the first position, for model width d; dtype is that of the convolution's inputs."""
        _, h, c = cfg.sizes(d)
        s = jnp.zeros((b, h, cfg.head_dim, cfg.d_state), jnp.float32)
        return cls(jnp.zeros((b, cfg.d_conv - 1, c), dtype), s)


def mamba2_spec(d: int, cfg: Mamba2Config, out_scale: float = 1.0) -> dict[str, ParamSpec]:
    """Parameters of `mamba2` for model width d, with the published initial values.

    in_proj yields [z (e) | x (e) | B (n) | C (n) | dt (h)]; conv_w [c, d_conv] has the newest input last.
    Raises AtomError where head_dim does not divide the inner width.
    """
    e, h, c = cfg.sizes(d)
    # Parts of different sizes lie side by side in the outputs of in_proj: a tensor axis would cut across them.
    return {
        "in_proj": ParamSpec((d, e + c + h), ("embed", None), normal(0.02)),
        "conv_w": ParamSpec((c, cfg.d_conv), (None, "taps"), _uniform(cfg.d_conv**-0.5)),
        "conv_b": ParamSpec((c,), (None,), _uniform(cfg.d_conv**-0.5)),
        "dt_bias": ParamSpec((h,), (None,), _init_dt_bias),
        "A_log": ParamSpec((h,), (None,), _init_a_log),
        "D": ParamSpec((h,), (None,), ones),
        "norm": ParamSpec((e,), ("mlp",), ones),
        "out_proj": ParamSpec((e, d), ("mlp", "embed"), normal(0.02 * out_scale)),
    }


def _uniform(bound: float) -> Any:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _init_dt_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The inverse of softplus at time steps that are log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(0.1)))
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def _init_a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0)).astype(dtype)


def mamba2(
    p: dict[str, jax.Array], x_btd: jax.Array, tokens: Tokens, state: MambaState | None, cfg: Mamba2Config
) -> tuple[jax.Array, MambaState | None]:
    """One Mamba-2 layer (without norm and residual around it): [b, t, d] to [b, t, d] in the dtype of x.

    State and convolution start anew where a document begins (the segment changes, or the position is 0); padding
    (segment 0) changes neither. It comes after a row's real positions, or before them in rows that carry nothing.
    Products inside a block run in the dtype of x with float32 sums; decays, time steps and states are float32, for
    which `dt_bias`, `A_log` and `D` should be passed as float32.

    Args:
      p: as `mamba2_spec` describes. x_btd: inputs; outputs at padding are meaningless.
      state: what earlier calls left, whose document goes on at positions > 0; None (training): nothing before.
    Returns: the outputs, and the state after the last real position of every row (None for None).
    """
    b, t, d = x_btd.shape
    e, h, c = cfg.sizes(d)
    old = MambaState.empty(b, d, cfg, x_btd.dtype) if state is None else state
    if state is None and tensor_shards() > 1:
        # Every device computes its heads' part of z, x and the time steps, and all of B and C.
        parts = zip(jnp.split(p["in_proj"], [e, 2 * e, e + c], axis=1), ("mlp", "mlp", None, "heads"))
        z, x, bc, dt = (constrain(project(x_btd, w), "batch", None, axis) for w, axis in parts)
        weights = zip(*(jnp.split(a, [e], axis=i) for a, i in ((p["conv_w"], 0), (p["conv_b"], 0), (old.conv, 2))))
        x, bc = (causal_conv(a, *w, tokens)[0] for a, w in zip((x, bc), weights))
        taps = old.conv
    else:
        z, xbc, dt = jnp.split(project(x_btd, p["in_proj"]), [e, e + c], axis=-1)
        xbc, taps = causal_conv(xbc, p["conv_w"], p["conv_b"], old.conv, tokens)
        x, bc = jnp.split(xbc, [e], axis=-1)
    x, bc = (jax.nn.silu(a).astype(x_btd.dtype) for a in (x, bc))
    b_btn, c_btn = jnp.split(bc, 2, axis=-1)
    x_bthk = constrain(x.reshape(b, t, h, cfg.head_dim), "batch", None, "heads", None)
    dt_bth = jax.nn.softplus(dt.astype(jnp.float32) + p["dt_bias"].astype(jnp.float32)[None, None])
    dt_bth = jnp.where((tokens.segments > 0)[..., None], dt_bth, 0.0)
    decay_bth = -jnp.exp(p["A_log"].astype(jnp.float32))[None, None] * dt_bth
    parts = (x_bthk, dt_bth, decay_bth, b_btn, c_btn, documents(tokens))
    y_bthk, s = _step(parts, old.s) if t == 1 else _blocks(parts, old.s, min(cfg.chunk, t))
    y_bthk = y_bthk + x_bthk.astype(jnp.float32) * p["D"].astype(jnp.float32)[None, None, :, None]
    gated = y_bthk.reshape(b, t, e) * jax.nn.silu(z.astype(jnp.float32))
    out = project(rms_norm(gated, p["norm"], EPS).astype(x_btd.dtype), p["out_proj"])
    return out, None if state is None else MambaState(taps, s)


# x [b, t, h, k], time steps and log decays f32 [b, t, h], B and C [b, t, n], documents i32 [b, t].
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _step(parts: Parts, s_bhkn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The recurrence for one position: outputs f32 [b, 1, h, k] and the new state."""
    x, dt, decay, b, c, document = (a[:, 0] for a in parts)
    keep = jnp.where((document == 0)[:, None], jnp.exp(decay), 0.0)
    new = jnp.einsum("bhk,bn->bhkn", x.astype(jnp.float32) * dt[..., None], b.astype(jnp.float32))
    s_bhkn = s_bhkn * keep[..., None, None] + new
    return jnp.einsum("bhkn,bn->bhk", s_bhkn, c.astype(jnp.float32))[:, None], s_bhkn


def _blocks(parts: Parts, s_bhkn: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The same for t positions, block after block."""
    rows, heads, states = ("batch",), ("batch", None, "heads"), ("batch", "heads")
    run = functools.partial(ssd_chunk, chunk=size)
    return split(run, (heads, heads, heads, rows, rows, rows, states), (heads, states), *parts, s_bhkn)
