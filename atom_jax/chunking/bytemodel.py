"""A small causal byte transformer with a sliding window, for the entropies that BLT's patches are cut by.

Memory per row is the window, whatever has been read, so texts of any length pass through.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config, params
from atom_jax.chunking.types import last_index
from atom_jax.kvcache.memory import Stack
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens, attend, attention_spec
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.linear import project
from atom_jax.nn.mlp import swiglu, swiglu_spec
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, normal, ones
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class ByteModel:
    """Sizes of the entropy model: pre-norm layers with rotary attention and SwiGLU, float32, tied embeddings."""

    vocab_size: int = 264
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    d_ff: int = 192
    # Bytes that attention sees, its own included.
    window: int = 64

    def __post_init__(self):
        size = (1, 2**24)
        config.check(
            self, vocab_size=(1, 2**28), d_model=size, n_layers=(1, 10_000), n_heads=size, d_ff=size, window=size
        )
        if self.d_model % (2 * self.n_heads):
            raise AtomError(f"d_model {self.d_model} is not an even number of channels for {self.n_heads} heads")


@struct.dataclass
class Window:
    """The last w bytes of every row. keys, values: f32 [b, h, w, k] of all layers; positions i32 [b, w];
    same: bool [b, w], in the document of the latest byte."""

    keys: Stack
    values: Stack
    positions: jax.Array
    same: jax.Array


def spec(cfg: ByteModel) -> params.Tree:
    """ParamSpec tree; tensors under "layers" are stacked over a leading layer axis."""
    d, n = cfg.d_model, cfg.n_heads
    out_scale = (2 * cfg.n_layers) ** -0.5
    layer = {
        "attn_norm": ParamSpec((d,), (None,), ones),
        "attn": attention_spec(d, n, n, d // n, "none", out_scale),
        "mlp_norm": ParamSpec((d,), (None,), ones),
        "mlp": swiglu_spec(d, cfg.d_ff, out_scale),
    }
    return {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), normal(d**-0.5)),
        "layers": params.stack(layer, cfg.n_layers),
        "norm": ParamSpec((d,), (None,), ones),
    }


def init_state(cfg: ByteModel, b: int) -> Window:
    """What is remembered of b rows before their first byte."""
    w, shape = cfg.window, (cfg.n_layers, b, cfg.n_heads, cfg.window, cfg.d_model // cfg.n_heads)
    return Window(*(Stack(jnp.zeros(shape)) for _ in range(2)), jnp.zeros((b, w), jnp.int32), jnp.zeros((b, w), bool))


def nearer(state: Window, by_b: jax.Array, *, cfg: ByteModel) -> Window:
    """The same bytes at positions `by_b`, i32 [b], lower."""
    cos, sin = rope.tables(-by_b[:, None], cfg.d_model // cfg.n_heads, 10000.0)
    keys = jax.vmap(lambda k_bhwk: rope.rotate(k_bhwk, cos, sin))(state.keys.states)
    return state.replace(keys=Stack(keys), positions=state.positions - by_b[:, None])


def apply(
    p: params.Tree, ids_bt: jax.Array, tokens: Tokens, state: Window, *, cfg: ByteModel
) -> tuple[jax.Array, Window]:
    """Logits f32 [b, t, v] of the byte after each position, and the state after these bytes.

    Rows and packed documents do not see each other; padding changes no state.
    """
    # A row that carries a document on has it first; what was read of it stands in the same segment.
    carried = state.same & (tokens.positions[:, :1] > 0)
    segments = jnp.concatenate([jnp.where(carried, tokens.segments[:, :1], -1), tokens.segments], axis=1)
    keys_at = Tokens(jnp.concatenate([state.positions, tokens.positions], axis=1), segments)
    tables = rope.tables(tokens.positions, cfg.d_model // cfg.n_heads, 10000.0)

    def layer(x_btd: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        p, k_bhwk, v_bhwk = inputs
        y = rms_norm(x_btd, p["attn_norm"], 1e-5)
        q, k, v = (project(y, p["attn"][name]) for name in "qkv")
        q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)
        k_bhsk, v_bhsk = (
            jnp.concatenate([old, new.transpose(0, 2, 1, 3)], axis=2) for old, new in ((k_bhwk, k), (v_bhwk, v))
        )
        out = windowed(q.transpose(0, 2, 1, 3), k_bhsk, v_bhsk, tokens, keys_at, cfg.window)
        x_btd = x_btd + project(out.transpose(0, 2, 1, 3), p["attn"]["o"], inputs=2)
        x_btd = x_btd + swiglu(p["mlp"], rms_norm(x_btd, p["mlp_norm"], 1e-5))
        return x_btd, (_latest(k_bhsk, tokens, cfg.window), _latest(v_bhsk, tokens, cfg.window))

    # Entropies are compared with thresholds: the same bytes must give them whatever the shapes of the call.
    with jax.default_matmul_precision("highest"):
        x_btd = jnp.take(p["embed"], ids_bt, axis=0).astype(jnp.float32)
        x_btd, (keys, values) = jax.lax.scan(layer, x_btd, (p["layers"], state.keys.states, state.values.states))
        x_btd = rms_norm(x_btd, p["norm"], 1e-5)
        logits = project(x_btd, p["embed"].T.astype(jnp.float32))
    return logits, Window(Stack(keys), Stack(values), *_places(state, keys_at, tokens, carried, cfg.window))


def windowed(q_bhtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, q: Tokens, k: Tokens, window: int) -> jax.Array:
    """Sliding-window attention [b, h, t, k] to s = window + t keys, of which key window + i stands where query i
    does: blocks of queries see two blocks of keys, so that time and memory grow with t * window."""
    b, h, t, size = q_bhtk.shape
    block = min(t, window)
    n = -(-t // block)

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        """[b, ..., n' block, ...] to [b, n', ..., block, ...], filled up with zeros."""
        return jnp.moveaxis(in_blocks(x, axis, block), 0, 1)

    def pairs(x: jax.Array, axis: int) -> jax.Array:
        """[b, ..., window + t, ...] to [b n, ..., window + block, ...], what each block of queries may see."""
        if n == 1:
            return x
        x = blocks(x, axis)
        return rows(jnp.concatenate([x[:, :-1], x[:, 1:]], axis=axis + 1))

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    queries = rows(blocks(q_bhtk, 2))[:, :, None]
    q_at = Tokens(rows(blocks(q.positions, 1)), rows(blocks(q.segments, 1)))
    k_at = Tokens(pairs(k.positions, 1), pairs(k.segments, 1))
    out = attend(queries, pairs(k_bhsk, 2), pairs(v_bhsk, 2), q_at, k_at, window=window)[:, :, 0]
    return out.reshape(b, n, h, block, size).transpose(0, 2, 1, 3, 4).reshape(b, h, n * block, size)[:, :, :t]


def _latest(x: jax.Array, tokens: Tokens, window: int) -> jax.Array:
    """The `window` entries up to the last real one of [b, ..., window + t, k] or [b, window + t]."""
    axis = 0 if x.ndim == 2 else x.ndim - 3
    cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, window, axis))
    return cut(x, last_index(tokens) + 1)


def _places(
    state: Window, keys_at: Tokens, tokens: Tokens, carried: jax.Array, window: int
) -> tuple[jax.Array, jax.Array]:
    """Positions [b, w] of the remembered bytes, and whether they are of the latest one's document."""
    real = jnp.concatenate([carried, tokens.segments > 0], axis=1)
    segments = _latest(jnp.where(real, keys_at.segments, -1), tokens, window)
    same = (segments == segments[:, -1:]) & (segments > 0)
    idle = (last_index(tokens) < 0)[:, None]
    return _latest(keys_at.positions, tokens, window), jnp.where(idle, state.same, same)
