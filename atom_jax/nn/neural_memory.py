"""Neural memory: a small network per head whose weights are learned while a sequence is read (Titans, Behrouz et al.,
2025), with the formulas of the titans-pytorch package; there is no official code.

Dimension letters besides those of `atom_jax.typing`: h heads, k size of a head, c positions of a chunk, w of a
window, f features of a position.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.nn.attention import Tokens
from atom_jax.nn.blocks import in_blocks
from atom_jax.nn.conv import documents
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, constant, normal, ones, zeros

# Positions whose gradients make one step; after how many the weights move at which gradients are taken; the largest
# learning rate.
CHUNK, BATCH, RATE = 16, 64, 0.1
# Of the norms of what is stored and looked up: float32's, and of the network's outputs.
EPS, NETWORK_EPS = 1.1920929e-07, 1e-5
# Inner width of the network over the size of a head.
WIDER = 2


class Weights(NamedTuple):
    """Of the networks of all rows: gamma f32 [b, h, k], and matrices f32 [b, h, i, j]; of learned starting values
    without b."""

    gamma: Any
    matrices: tuple[Any, ...]


@struct.dataclass
class NeuralState:
    """What a layer remembers of each row.

    weights, momentum, used: `Weights`: what is read, its speed, and where gradients are taken. latest: f32
    [b, c - 1, h, f], of the newest positions. count: i32 [b], positions of the document so far.
    """

    weights: Weights
    momentum: Weights
    used: Weights
    latest: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls, b: int, d: int, heads: int, matrices: int = 2, chunk: int = CHUNK) -> NeuralState:
        """Before the first position, for model width d."""
        k = d // heads
        shapes = _shapes(k, matrices)
        none = Weights(jnp.zeros((b, heads, k)), tuple(jnp.zeros((b, heads, *shape)) for shape in shapes))
        return cls(none, none, none, jnp.zeros((b, chunk - 1, heads, 2 * k + 3)), jnp.zeros(b, jnp.int32))


def layer_spec(d: int, heads: int, std: float = 0.02, out_scale: float = 1.0, matrices: int = 2) -> dict[str, Any]:
    """Parameters of `layer` for model width d, which the heads divide. matrices: of the network, with GELU between
    them. What is forgotten begins at a fiftieth of the weights per chunk."""
    k = d // heads

    def gate(start: float) -> dict[str, ParamSpec]:
        axes = ("embed", "heads")
        return {"w": ParamSpec((d, heads), axes, normal(std)), "b": ParamSpec((heads,), axes[1:], constant(start))}

    spec = {
        "store_norm": ParamSpec((d,), (None,), ones),
        "read_norm": ParamSpec((d,), (None,), ones),
        **{name: ParamSpec((d, heads, k), ("embed", "heads", None), normal(std)) for name in ("q", "k", "v")},
        "rate": gate(0.0),
        "decay": gate(-4.0),
        "momentum": gate(0.0),
        "gamma": ParamSpec((heads, k), ("heads", None), zeros),
        "matrices": {
            str(i): ParamSpec((heads, *shape), ("heads", None, None), normal(shape[0] ** -0.5))
            for i, shape in enumerate(_shapes(k, matrices))
        },
    }
    if heads > 1:
        spec["gate"] = ParamSpec((d, heads), ("embed", "heads"), normal(std))
        spec["o"] = ParamSpec((heads, k, d), ("heads", None, "embed"), normal(std * out_scale))
    return spec


def _shapes(k: int, matrices: int) -> list[tuple[int, int]]:
    sizes = [k, *[WIDER * k] * (matrices - 1), k]
    return list(itertools.pairwise(sizes))


def layer(
    p: dict[str, Any], x_btd: jax.Array, tokens: Tokens, state: NeuralState | None, chunk: int = CHUNK,
    batch: int | None = BATCH, rate: float = RATE,
) -> tuple[jax.Array, NeuralState | None]:  # fmt: skip
    """A layer of neural memory, [b, t, d] to [b, t, d] in the dtype of x.

    Every head's network is M(x) = LayerNorm(mlp(x)) (1 + gamma) + x. After every `chunk` positions of a document its
    weights take a step, W <- (1 - decay) W + m, m <- momentum m - the gradient of the sum over the chunk of
    rate_t mean (M(k_t) - v_t)^2, and every position reads M(q) with the steps that are complete at it, its own
    included; so the results depend on nothing after it, nor on how the text is cut into calls.

    Args:
      p: as of `layer_spec`; without "momentum", m is the last gradient alone. Heads are gated and projected where
        there is "gate".
      tokens: where the inputs stand; every document begins with the learned weights. Padding changes nothing.
      state: what earlier calls left, or None.
      batch: gradients are taken at the weights after the last multiple of so many positions (chunks divide it), and
        not at the newest, as the paper has it: chunks between can then be learned from together. None: always at the
        learned weights.
      rate: the largest learning rate.
    Everything in float32. Returns the outputs, and the state (None for None).
    """
    stored, wanted = (rms_norm(x_btd.astype(jnp.float32), p[name], EPS) for name in ("store_norm", "read_norm"))

    def heads(x_btd: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("btd,dhk->bthk", x_btd, w, preferred_element_type=jnp.float32)

    def gate(name: str) -> jax.Array:
        logit = jnp.einsum("btd,dh->bth", stored, p[name]["w"], preferred_element_type=jnp.float32)
        return (logit + p[name]["b"][None, None])[..., None]

    size = p["gamma"].shape[1]
    step = jax.nn.sigmoid(gate("rate")) * rate
    momentum = gate("momentum") if "momentum" in p else jnp.full_like(step, -jnp.inf)
    seen = jnp.concatenate([heads(stored, p["k"]), heads(stored, p["v"]), step, gate("decay"), momentum], axis=-1)
    matrices = (p["matrices"][str(i)] for i in range(len(p["matrices"])))
    start = jax.tree.map(lambda x: x.astype(jnp.float32), Weights(p["gamma"], tuple(matrices)))
    y_bthk, new = _read(start, heads(wanted, p["q"]), seen, tokens, state, chunk, batch)
    if "gate" in p:
        open_bth = jax.nn.sigmoid(jnp.einsum("btd,dh->bth", wanted, p["gate"], preferred_element_type=jnp.float32))
        y_bthk = y_bthk * open_bth[..., None]
        out = jnp.einsum("bthk,hkd->btd", y_bthk, p["o"], preferred_element_type=jnp.float32)
    else:
        out = y_bthk.reshape(*y_bthk.shape[:2], size)
    return out.astype(x_btd.dtype), None if state is None else new


def _read(
    start: Weights, q_bthk: jax.Array, seen_bthf: jax.Array, tokens: Tokens, state: NeuralState | None, chunk: int,
    batch: int | None,
) -> tuple[jax.Array, NeuralState]:  # fmt: skip
    """What the networks say of queries, [b, t, h, k], and the state afterwards. seen: keys, values, learning rates,
    and the logits of decay and momentum.

    Positions are read in windows of at most a chunk, so that in a window at most one chunk ends in every row,
    wherever its documents begin; that one belongs to the document of the window's first position.
    """
    b, t, h, _ = q_bthk.shape
    document_bt, real_bt = documents(tokens), tokens.segments > 0
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (b, *x.shape)), start)
    if state is None:
        still = jax.tree.map(jnp.zeros_like, first)
        latest = jnp.zeros((b, chunk - 1, h, seen_bthf.shape[-1]))
        state = NeuralState(first, still, first, latest, jnp.zeros(b, jnp.int32))
    count_bt = _counts(document_bt, real_bt, state.count)
    ends_bt = real_bt & (count_bt % chunk == 0)
    moves_bt = jnp.zeros_like(ends_bt) if batch is None else ends_bt & (count_bt % batch == 0)
    size = min(chunk, t)

    read = (in_blocks(x, 1, size) for x in (q_bthk, seen_bthf, ends_bt, moves_bt))
    parts = (*read, in_blocks(document_bt, 1, size, "edge"))

    def one(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        now, latest, before_b = carry
        q, seen, ends, moves, document = part
        goes_on = document[:, 0] == before_b
        begun = (first, jax.tree.map(jnp.zeros_like, first), first)
        now = _where(goes_on, now, begun)
        seen = jnp.concatenate([latest, seen], axis=1)
        has, at = jnp.any(ends, axis=1), jnp.argmax(ends, axis=1)
        rows = jnp.take_along_axis(seen, (at[:, None] + jnp.arange(chunk)[None])[..., None, None], axis=1)
        moved = jnp.any(moves, axis=1)
        stepped = jax.lax.cond(
            jnp.any(has), lambda now: _where(has, _step(now, rows, moved), now), lambda now: now, now
        )
        late = has[:, None] & (jnp.arange(size)[None] >= at[:, None])
        y = jnp.where(late[..., None, None], _network(stepped[0], q), _network(now[0], q))
        same = document == document[:, :1]
        y = jnp.where(same[..., None, None], y, _network(first, q))
        last = document[:, -1]
        return (_where(same[:, -1], stepped, begun), seen[:, size:], last), y

    carry = ((state.weights, state.momentum, state.used), state.latest, jnp.zeros(b, jnp.int32))
    ((weights, momentum, used), _, _), y = jax.lax.scan(one, carry, parts)
    y = jnp.moveaxis(y, 0, 1).reshape(b, -1, *y.shape[3:])[:, :t]
    end_b = jnp.max(jnp.where(real_bt, jnp.arange(1, t + 1)[None], 0), axis=1)
    newest = (end_b[:, None] + jnp.arange(chunk - 1)[None])[..., None, None]
    latest = jnp.take_along_axis(jnp.concatenate([state.latest, seen_bthf], axis=1), newest, axis=1)
    return y, NeuralState(weights, momentum, used, latest, count_bt[:, -1])


def _counts(document_bt: jax.Array, real_bt: jax.Array, before_b: jax.Array) -> jax.Array:
    """i32 [b, t], positions of its document up to and including each; padding counts as its predecessor does."""
    index = jnp.cumsum(real_bt, axis=1, dtype=jnp.int32)
    begins = jnp.diff(document_bt, axis=1, prepend=0) > 0
    ahead = jax.lax.cummax(jnp.where(begins, index - 1, 0), axis=1)
    return jnp.where(document_bt > 0, index - ahead, before_b[:, None] + index)


def _network(weights: Weights, x_bthk: jax.Array) -> jax.Array:
    y = x_bthk
    for i, w_bhij in enumerate(weights.matrices):
        y = jax.nn.gelu(y, approximate=False) if i else y
        y = jnp.einsum("bthi,bhij->bthj", y, w_bhij)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + NETWORK_EPS)
    return y * (1.0 + weights.gamma[:, None]) + x_bthk


def _step(now: tuple, rows_bchf: jax.Array, moves_b: jax.Array) -> tuple:
    """Weights, momentum and the place of gradients after a chunk."""
    weights, momentum, used = now
    size = (rows_bchf.shape[-1] - 3) // 2
    k, v, rate = rows_bchf[..., :size], rows_bchf[..., size : 2 * size], rows_bchf[..., 2 * size]
    decay, keeps = jax.nn.sigmoid(rows_bchf[..., 2 * size + 1 :].mean(1)).transpose(2, 0, 1)

    def loss(used: Weights) -> jax.Array:
        return (rate * jnp.square(_network(used, k) - v).mean(-1)).sum()

    each = lambda x_bh, like: x_bh.reshape(*x_bh.shape, *[1] * (like.ndim - 2))  # noqa: E731
    momentum = jax.tree.map(lambda m, g: each(keeps, m) * m - g, momentum, jax.grad(loss)(used))
    weights = jax.tree.map(lambda w, m: (1.0 - each(decay, w)) * w + m, weights, momentum)
    return weights, momentum, _where(moves_b, weights, used)


def _where(which_b: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(which_b.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)
