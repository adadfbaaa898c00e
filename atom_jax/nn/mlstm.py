"""mLSTM: a recurrent layer with a matrix memory per head and exponential gates (Beck et al., 2024, "xLSTM").

Dimension letters besides those of `atom_jax.typing`: h heads with keys of size k and values of size v, i and j
positions of one block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens
from atom_jax.nn.conv import documents
from atom_jax.nn.linear import project
from atom_jax.params import ParamSpec, constant, normal, ones, zeros
from atom_jax.sharding import constrain, split
from atom_jax.typing import AtomError
from pallas_kernels.dispatch import NEGATIVE
from pallas_kernels.mlstm_chunk.api import mlstm_chunk

# Bound on the gates' logits, and what is added to the normaliser and to the variance of a head.
CAP = 15.0
EPS = 1e-6


@struct.dataclass
class MLSTMState:
    """What a layer remembers of each row, all float32: c [b, h, k, v] the memory and n [b, h, k] its normaliser, both
    scaled by exp(-m), m [b, h]."""

    c: jax.Array
    n: jax.Array
    m: jax.Array

    @classmethod
    def empty(cls, b: int, d: int, heads: int) -> MLSTMState:
        """Before the first position, for model width d."""
        k, v = sizes(d, heads)
        return cls(*(jnp.zeros((b, heads, *rest), jnp.float32) for rest in ((k, v), (k,), ())))


def sizes(d: int, heads: int) -> tuple[int, int]:
    """Channels of a key and of a value for model width d; AtomError where the heads do not divide it."""
    if heads < 1 or d % (2 * heads):
        raise AtomError(f"heads: {heads} mLSTM heads do not divide half the width {d}")
    return d // 2 // heads, d // heads


def mlstm_spec(d: int, heads: int, out_scale: float = 1.0) -> dict[str, Any]:
    """Parameters of `mlstm` for model width d. Input gates start almost closed (bias -10), as Bolmo starts them."""
    k, v = sizes(d, heads)
    std = d**-0.5

    def gate(bias: Any) -> dict[str, ParamSpec]:
        return {
            "w": ParamSpec((d, heads), ("embed", "heads"), normal(std)),
            "b": ParamSpec((heads,), ("heads",), bias),
        }

    return {
        "q": ParamSpec((d, heads, k), ("embed", "heads", None), normal(std)),
        "k": ParamSpec((d, heads, k), ("embed", "heads", None), normal(std)),
        "v": ParamSpec((d, heads, v), ("embed", "heads", None), normal(std)),
        "gate": ParamSpec((d, heads, v), ("embed", "heads", None), normal(std)),
        "input": gate(constant(-10.0)),
        "forget": gate(zeros),
        "norm": ParamSpec((d,), ("heads",), ones),
        "o": ParamSpec((heads, v, d), ("heads", None, "embed"), normal(std * out_scale)),
    }


def mlstm(
    p: dict[str, Any], x_btd: jax.Array, tokens: Tokens, state: MLSTMState | None, chunk: int = 64
) -> tuple[jax.Array, MLSTMState | None]:
    """One mLSTM layer (without norm and residual around it): [b, t, d] to [b, t, d] in the dtype of x.

    The memory starts anew where a document begins (the segment changes, or the position is 0); padding (segment 0)
    leaves it as it is, and comes after a row's real positions, or before them in rows that carry nothing. Gates,
    memory and the norm of every head are float32, products within a block have float32 sums.

    Args:
      p: as `mlstm_spec` describes. x_btd: inputs; outputs at padding are meaningless.
      state: what earlier calls left, whose document goes on at positions > 0; None (training): nothing before.
      chunk: positions per block; changes speed and memory, not results.
    Returns: the outputs, and the state after the last real position of every row (None for None).
    """
    b, _, d = x_btd.shape
    heads = p["forget"]["b"].shape[0]
    q, k, v, o = (
        constrain(project(x_btd, p[name]), "batch", None, "heads", None) for name in ("q", "k", "v", "gate")
    )
    parts = (q, k, v, *_gates(p, x_btd), tokens)
    h_bthv, new = recur(*parts, MLSTMState.empty(b, d, heads) if state is None else state, chunk)
    h_bthv = h_bthv - jnp.mean(h_bthv, axis=-1, keepdims=True)
    h_bthv = h_bthv * jax.lax.rsqrt(jnp.mean(jnp.square(h_bthv), axis=-1, keepdims=True) + EPS)
    weight = p["norm"].astype(jnp.float32).reshape(1, 1, heads, -1)
    out_bthv = (h_bthv * weight).astype(x_btd.dtype) * jax.nn.sigmoid(o)
    return project(out_bthv, p["o"], inputs=2), None if state is None else new


def _gates(p: dict[str, Any], x_btd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits f32 [b, t, h] of the input and of the forget gate, within the cap."""

    def gate(name: str) -> jax.Array:
        w, bias = (p[name][part].astype(jnp.float32) for part in "wb")
        return CAP * jnp.tanh((project(x_btd.astype(jnp.float32), w) + bias[None, None]) / CAP)

    return gate("input"), gate("forget")


def recur(
    q_bthk: jax.Array, k_bthk: jax.Array, v_bthv: jax.Array, input_bth: jax.Array, forget_bth: jax.Array,
    tokens: Tokens, state: MLSTMState, chunk: int = 64,
) -> tuple[jax.Array, MLSTMState]:  # fmt: skip
    """The recurrence alone: outputs f32 [b, t, h, v] and the state after the last real position.

    With lf = log sigmoid(forget), for every head: m' = max(lf + m, input); c' = exp(lf + m - m') c + exp(input - m')
    k v^T; n' likewise with k; h = q c' / (max(|q n'|, exp(-m')) + 1e-6), q over the square root of k's size. All of
    a document's states start at 0, m included: the constant counts in the scale of m. One position runs as written;
    more run block by block in the equal parallel form, with memory linear in t for the gradient too.

    Args: input_bth, forget_bth: f32 logits of the gates. The others as for `mlstm`.
    """
    t, real = q_bthk.shape[1], (tokens.segments > 0)[..., None]
    i_bth = jnp.where(real, input_bth, NEGATIVE)
    f_bth = jnp.where(real, jax.nn.log_sigmoid(forget_bth), 0.0)
    parts = (q_bthk, k_bthk, v_bthv, i_bth, f_bth, documents(tokens))
    return _step(parts, state) if t == 1 else _blocks(parts, state, min(chunk, t))


# q, k [b, t, h, k], v [b, t, h, v], input logits and log forget gates f32 [b, t, h], documents i32 [b, t].
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _step(parts: Parts, old: MLSTMState) -> tuple[jax.Array, MLSTMState]:
    q, k, v, i, f, document = (a[:, 0] for a in parts)
    q, k, v = (a.astype(jnp.float32) for a in (q * q.shape[-1] ** -0.5, k, v))
    goes_on = (document == 0)[:, None]
    before = jnp.where(goes_on, old.m, 0.0)
    m = jnp.maximum(f + before, i)
    keep, add = jnp.where(goes_on, jnp.exp(f + before - m), 0.0)[..., None], jnp.exp(i - m)[..., None]
    n = keep * old.n + add * k
    c = keep[..., None] * old.c + (add * k)[..., None] * v[..., None, :]
    above, below = jnp.einsum("bhk,bhkv->bhv", q, c), jnp.einsum("bhk,bhk->bh", q, n)
    return _normalised(above, below, m)[:, None], MLSTMState(c, n, m)


def _normalised(above: jax.Array, below: jax.Array, m: jax.Array) -> jax.Array:
    return above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)[..., None]


def _blocks(parts: Parts, old: MLSTMState, size: int) -> tuple[jax.Array, MLSTMState]:
    """The same for t positions, block after block."""

    def run(*args: jax.Array) -> tuple[jax.Array, ...]:
        h_bhtv, state = mlstm_chunk(*args[:6], args[6:], chunk=size)
        return h_bhtv, *state

    *floats, document = parts
    heads = ("batch", "heads")
    args = (*(a.swapaxes(1, 2) for a in floats), document, old.c, old.n, old.m)
    h_bhtv, *state = split(run, (heads,) * 5 + (("batch",),) + (heads,) * 3, (heads,) * 4, *args)
    return h_bhtv.swapaxes(1, 2), MLSTMState(*state)
