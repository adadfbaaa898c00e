"""Vision transformer layers between whose halves tokens are reduced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import reduction
from atom_jax.nn import vit
from atom_jax.params import Tree
from atom_jax.reduction.types import Reduction, Seen
from atom_jax.typing import AtomError

# Added to the scores of slots that nothing is in.
_UNUSED = -1e9


@struct.dataclass
class Reduced:
    """x [b, m, d] after all layers, size f32 [b, m] of the tokens (0: unused), and where the first ones are now."""

    x: jax.Array
    size: jax.Array
    trace: Reduction


def blocks(
    p: Tree,
    x_btd: jax.Array,
    reducers: tuple[Any, ...],
    eps: float,
    *,
    grid: tuple[int, int] | None = None,
    protected: int = 0,
    proportional: bool = True,
) -> Reduced:
    """As `vit.blocks` where all tokens see one another, but after the attention of every layer its reducer acts.

    Args:
      p: parameters of `vit.block`, stacked.
      reducers: a configuration or None for every layer.
      grid, protected: see `reduction.Seen`.
      proportional: attention counts a token as often as the tokens that it stands for (Bolya et al., 2023); not for
        models that were trained with merging.
    Raises AtomError unless there is a reducer, or None, for each layer.
    """
    n = p["qkv"].shape[0]
    if len(reducers) != n:
        raise AtomError(f"reducers: there are {len(reducers)} for {n} layers")
    b, t, _ = x_btd.shape
    state, begun = Reduced(x_btd, jnp.ones((b, t)), reduction.identity(b, t)), 0
    for i in [i for i, reducer in enumerate(reducers) if reducer is not None]:
        looks = getattr(reduction.of(reducers[i]), "ATTENTION", False)
        state, attention_lbt = _run(_part(p, begun, i), state, eps, proportional, looks)
        state = _reducing(_part(p, i, i + 1), state, attention_lbt, reducers[i], eps, proportional, grid, protected)
        grid, begun = None, i + 1
    return _run(_part(p, begun, n), state, eps, proportional, looks=False)[0]


def received(q_bhtk: jax.Array, k_bhtk: jax.Array, bias_bt: jax.Array | None) -> jax.Array:
    """f32 [b, t]: the attention that every token gets, averaged over heads and queries."""
    scores = (
        jnp.einsum("bhtk,bhsk->bhts", q_bhtk, k_bhtk, preferred_element_type=jnp.float32) * q_bhtk.shape[-1] ** -0.5
    )
    if bias_bt is not None:
        scores += jnp.broadcast_to(bias_bt[:, None, None], scores.shape)
    return jax.nn.softmax(scores, axis=-1).mean((1, 2))


def _part(p: Tree, begin: int, end: int) -> Tree:
    return jax.tree.map(lambda w: w[begin:end], p)


def _bias(state: Reduced, proportional: bool) -> jax.Array | None:
    """What is added to the scores of keys; None before the first reduction."""
    if state.size.shape == state.trace.slot.shape:
        return None
    used = state.size > 0
    return jnp.where(used, jnp.log(jnp.where(used, state.size, 1.0)) if proportional else 0.0, _UNUSED)


def _run(p: Tree, state: Reduced, eps: float, proportional: bool, looks: bool) -> tuple[Reduced, jax.Array | None]:
    """Layers without reducers. looks: and the attention f32 [l, b, t] that tokens get in them, else None."""
    tokens, bias = vit.everywhere(*state.x.shape[:2]), _bias(state, proportional)

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, jax.Array | None]:
        mixed = vit.mixed(p, x, tokens, eps, bias)
        return vit.fed(p, mixed.x, eps), received(mixed.q, mixed.k, bias) if looks else None

    x, attention_lbt = jax.lax.scan(layer, state.x, p)
    return state.replace(x=x), attention_lbt


def _reducing(
    p: Tree,
    state: Reduced,
    attention_lbt: jax.Array | None,
    reducer: Any,
    eps: float,
    proportional: bool,
    grid: tuple[int, int] | None,
    protected: int,
) -> Reduced:
    """One layer [1, ...] with a reducer. attention_lbt: of the layers before it, since the last reduction."""
    p = jax.tree.map(lambda w: w[0], p)
    bias = _bias(state, proportional)
    mixed = vit.mixed(p, state.x, vit.everywhere(*state.x.shape[:2]), eps, bias)
    seen = Seen(mixed.x, mixed.k.mean(1), grid=grid, protected=protected)
    if attention_lbt is not None:
        attention_lbt = jnp.concatenate([attention_lbt, received(mixed.q, mixed.k, bias)[None]])
        seen = seen.replace(attention=attention_lbt.transpose(1, 0, 2))
    found = reduction.reduce(reducer, seen)
    x, size = reduction.apply(mixed.x, state.size, found)
    return Reduced(vit.fed(p, x, eps), size, reduction.trace(state.trace, found))
