"""Tables of what follows from the latest ids alone, found by hashes (Engram, Cheng et al., 2026): conditional memory.

Dimension letters besides those of `atom_jax.typing`: n tables (of every length of an n-gram as many as it has heads),
c channels of a row, e channels of all rows of a position.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.nn.attention import Tokens
from atom_jax.nn.conv import causal_conv, remember
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, normal, ones, zeros
from atom_jax.typing import AtomError

# Inputs of the convolution of a channel.
TAPS = 4


@dataclasses.dataclass(frozen=True)
class Tables:
    """n-grams of 2 to `longest` ids, each with `heads` tables of at least `size` rows of `channels` numbers; the
    numbers of rows are primes, all different, as are the hashes. seed: of the factors in these. (The paper: 2 to 3,
    8 heads, 646,400 rows of 64.)"""

    size: int = 8192
    heads: int = 8
    longest: int = 3
    channels: int = 16
    seed: int = 0

    def __post_init__(self):
        if not (2 <= self.longest <= 8 and 1 <= self.heads <= 64 and 2 <= self.size <= 2**24 and self.channels >= 1):
            sizes = "2 to 8 ids, 1 to 64 heads, 2 to 2^24 rows and 1 or more channels"
            raise AtomError(f"ngrams: expected {sizes}, got {self}")

    @property
    def count(self) -> int:
        """How many tables there are."""
        return (self.longest - 1) * self.heads

    @functools.cached_property
    def primes(self) -> tuple[int, ...]:
        """Rows of every table: the first primes from `size` on."""
        found, n = [], self.size
        while len(found) < self.count:
            if all(n % i for i in range(2, int(n**0.5) + 1)):
                found.append(n)
            n += 1
        return tuple(found)

    @property
    def factors(self) -> np.ndarray:
        """Odd numbers u32 [longest], by which ids are multiplied, the newest one first."""
        drawn = np.random.default_rng(self.seed).integers(0, 2**31, self.longest, dtype=np.uint32)
        return drawn * np.uint32(2) + np.uint32(1)

    @property
    def span(self) -> int:
        """Positions before one that its convolution reads."""
        return (TAPS - 1) * self.longest


@struct.dataclass
class NgramState:
    """What a layer remembers of each row. ids: i32 [b, longest - 1], the latest. taps: [b, span, d], the latest
    inputs of the convolution."""

    ids: jax.Array
    taps: jax.Array

    @classmethod
    def empty(cls, b: int, d: int, tables: Tables, dtype: Any) -> NgramState:
        """Before the first position, for model width d; dtype is that of the layer's inputs."""
        return cls(jnp.zeros((b, tables.longest - 1), jnp.int32), jnp.zeros((b, tables.span, d), dtype))


def layer_spec(d: int, tables: Tables, std: float = 0.02, out_scale: float = 1.0) -> dict[str, ParamSpec]:
    """Parameters of `layer` for model width d. The convolution begins as nothing."""
    rows, e = sum(tables.primes), tables.count * tables.channels
    return {
        "table": ParamSpec((rows, tables.channels), (None, None), normal(1.0)),
        "key": ParamSpec((e, d), (None, "embed"), normal(std)),
        "key_bias": ParamSpec((d,), (None,), zeros),
        "key_norm": ParamSpec((d,), (None,), ones),
        "value": ParamSpec((e, d), (None, "embed"), normal(std * out_scale)),
        "value_bias": ParamSpec((d,), (None,), zeros),
        "conv_norm": ParamSpec((d,), (None,), ones),
        "conv": ParamSpec((d, TAPS), (None, None), zeros),
    }


def layer(
    p: dict[str, Any], x_btd: jax.Array, ids_bt: jax.Array, tokens: Tokens, state: NgramState | None, tables: Tables,
    eps: float,
) -> tuple[jax.Array, NgramState | None]:  # fmt: skip
    """What the tables say at each position, [b, t, d] in the dtype of x, and the state afterwards (None for None).

    Rows that `find` names are put beside each other: e. With g = sigmoid(sign(s) sqrt(|s|)), where
    s = norm(W_k e) . x / sqrt(d), with |s| at least 1e-6, and v = g W_v e, it is v + SiLU(conv(norm(v))), by a causal
    convolution of each channel over the positions 0, 3, 6 and 9 back (`longest` apart).

    Args:
      x_btd: the layer's inputs after a norm of their own, which is the paper's norm of the hidden states.
      ids_bt: i32, of the tokens; padding comes after them.

    Differs from the authors' demo, the only code there is: one branch of hidden states, where they have four; ids are
    not merged by how their texts are written; before a document's beginning stands the id 0, and not that of padding;
    every layer hashes alike into tables of its own, where their layers differ in factors and primes; hashes are of 32
    bits, see `find`.
    """
    before, dtype, d = None if state is None else state.ids, x_btd.dtype, x_btd.shape[-1]
    e_bte = p["table"][find(ids_bt, tokens, tables, before)].reshape(*ids_bt.shape, -1).astype(dtype)
    key, value = (
        jnp.einsum("bte,ed->btd", e_bte, p[name], preferred_element_type=jnp.float32)
        + p[f"{name}_bias"].astype(jnp.float32)[None, None]
        for name in ("key", "value")
    )
    s_bt = jnp.sum(rms_norm(key, p["key_norm"], eps) * x_btd.astype(jnp.float32), axis=-1) / d**0.5
    gate_bt = jax.nn.sigmoid(jnp.sign(s_bt) * jnp.sqrt(jnp.maximum(jnp.abs(s_bt), 1e-6)))
    v_btd = gate_bt[..., None] * value
    taps = jnp.zeros((len(x_btd), tables.span, d), dtype) if state is None else state.taps
    inputs, nothing = rms_norm(v_btd, p["conv_norm"], eps).astype(dtype), jnp.zeros(d)
    y_btd, taps = causal_conv(inputs, p["conv"], nothing, taps, tokens, tables.longest)
    out_btd = (v_btd + jax.nn.silu(y_btd)).astype(dtype)
    return out_btd, None if state is None else NgramState(remember(ids_bt, tokens, state.ids), taps)


def find(ids_bt: jax.Array, tokens: Tokens, tables: Tables, before: jax.Array | None = None) -> jax.Array:
    """Rows i32 [b, t, n] of all tables, which stand one after another: of n ids, each times its factor modulo 2^32,
    the exclusive or, modulo the number of rows. The tables of shorter n-grams come first. (The demo multiplies in 64
    bits, by factors so small that no product is cut.)

    before: i32 [b, longest - 1], ids read in earlier calls, the latest last; None: no earlier call.
    """
    t, longest = ids_bt.shape[1], tables.longest
    if before is None:
        before = jnp.zeros((len(ids_bt), longest - 1), jnp.int32)
    line = jnp.concatenate([before, ids_bt], axis=1)
    starts = np.cumsum([0, *tables.primes[:-1]])
    mixed, found = jnp.zeros(ids_bt.shape, jnp.uint32), []
    for back, factor in enumerate(tables.factors):
        at = longest - 1 - back
        word = jnp.where(tokens.positions >= back, line[:, at : at + t], 0).astype(jnp.uint32)
        mixed = mixed ^ (word * factor)
        if back:
            mine = slice((back - 1) * tables.heads, back * tables.heads)
            row = mixed[..., None] % np.array(tables.primes[mine], np.uint32)[None, None]
            found.append(row.astype(jnp.int32) + starts[mine].astype(np.int32)[None, None])
    return jnp.concatenate(found, axis=-1)
