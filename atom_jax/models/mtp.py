"""Multi-token heads: how a text goes on after the next token, guessed from one final state of a transformer.

Head k, from 0 on, guesses at token t + 2 + k, from what the head before it (head 0: the model, after token t) made of
the state, and token t + 1 + k, which is known by then. So the heads of one state give a chain whose tokens know of
each other, as Hydra's do (Ankner et al., 2024, 2402.05109); there every head reads the state and the embeddings of
all these tokens side by side, here it has them from the head before. The model's own table makes logits of what a
head gives, so that heads are small and begin as the model's opinion of the token before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, Tree, normal, ones, zeros

# Under which the heads lie beside a model's parameters.
NAME = "mtp"
_EPS = 1e-6


def spec(d: int, heads: int, width: int) -> Tree:
    """ParamSpecs of so many heads, stacked, for states and embeddings of width d. width: in between; 0: d, too."""
    width = width or d
    head = {
        "state_norm": ParamSpec((d,), (None,), ones),
        "token_norm": ParamSpec((d,), (None,), ones),
        "state": ParamSpec((d, width), ("embed", "mlp"), normal((2 * d) ** -0.5)),
        "token": ParamSpec((d, width), ("embed", "mlp"), normal((2 * d) ** -0.5)),
        "down": ParamSpec((width, d), ("mlp", "embed"), zeros),
    }
    return params.stack(head, heads)


def count(p: Tree) -> int:
    """The number of heads in parameters as of `spec`."""
    return p["down"].shape[0]


def head(p: Tree, x: jax.Array, token: jax.Array) -> jax.Array:
    """What one head (parameters as of `spec`, without the first axis) makes of states x [..., d] and the embeddings
    [..., d] of the tokens before those that it guesses at: states [..., d] in the dtype of x, for the head after it
    and for the model's logits."""
    p = params.cast(p, x.dtype)
    inner = rms_norm(x, p["state_norm"], _EPS) @ p["state"]
    inner += rms_norm(token.astype(x.dtype), p["token_norm"], _EPS) @ p["token"]
    return x + jax.nn.silu(inner) @ p["down"]


def chain(p: Tree, x: jax.Array, token: jax.Array, n: int, embed: Any, choose: Any) -> jax.Array:
    """i32 [b, n]: guesses of the first n heads, one after another.

    x: final states [b, d]. token: i32 [b], the ones that were chosen from them. embed: i32 [b] -> [b, d]. choose:
    (states [b, d], the number i32 [] of the head) -> i32 [b].
    """

    def one(carry: tuple[jax.Array, jax.Array], k: tuple[Tree, jax.Array]) -> tuple:
        x, token = carry
        x = head(k[0], x, embed(token))
        token = choose(x, k[1])
        return (x, token), token

    first = jax.tree.map(lambda a: a[:n], p)
    return jax.lax.scan(one, (x, token), (first, jnp.arange(n)))[1].T
