"""The kinds of layers that a layout may name, in a table by their letter.

    m  Mamba-2                 M  Mamba-2, then SwiGLU
    t  causal attention        T  causal attention, then SwiGLU
    l  landmark attention      L  landmark attention, then SwiGLU
    s  slots                   S  slots, then SwiGLU: the newest positions, and means of older ones
    e  kNN attention           E  kNN attention, then SwiGLU: the newest positions, and the nearest of older ones
    f  fast weights            F  fast weights, then SwiGLU
    n  neural memory           N  neural memory, then SwiGLU
    k  product keys, a table of values of which every position reads few (in the place of an MLP)
    h  hashed n-grams, tables of what follows from the latest ids alone (in the place of an MLP)
    x  the post-norm Transformer-XL layer of dynamic token pooling (attention with relative positions, then GELU MLP)

All but x are pre-norm with a residual carried in float32. A new kind is a `Mixer` and one call of `register`.
"""

from __future__ import annotations

from typing import Any

from atom_jax.kvcache.dense import DenseLayer
from atom_jax.models.flops import keys
from atom_jax.models.memory_mixers import (
    FastWeights,
    KnnAttention,
    Landmark,
    NeuralMemory,
    Ngrams,
    ProductKeys,
    Slots,
)
from atom_jax.models.mixer import Heads, Mixer, SelfAttention, Width
from atom_jax.nn import relative
from atom_jax.nn.ssd import MambaState, mamba2, mamba2_spec
from atom_jax.params import Tree
from atom_jax.typing import AtomError


class Mamba2(Mixer):
    """m and M."""

    exact = True

    def check(self, width: Width, where: str) -> None:
        """The heads must divide the inner width."""
        width.ssm.sizes(width.d)

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `mamba2`."""
        return mamba2_spec(width.d, width.ssm, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> MambaState:
        """States of a fixed size."""
        return MambaState.empty(b, width.d, width.ssm, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `mamba2`."""
        y_btd, state = mamba2(p, y_btd, context.tokens, state, width.ssm)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Of the matrix form."""
        e, n = width.ssm.expand * width.d, width.ssm.d_state
        block = min(width.ssm.chunk, positions)
        return positions * (2 * block * (n + e) + 4 * e * n)

    def describe(self, width: Width) -> str:
        """Size of the states."""
        return f"SSM states of {width.ssm.d_state}"


class Relative(Heads):
    """x."""

    whole = True

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `relative_layer`."""
        return relative.relative_spec(width.d, width.heads, width.f)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> DenseLayer:
        """Keys without positions, of all before."""
        return DenseLayer.empty(b, width.heads, capacity, width.head_dim, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """With the biases that layers share."""
        x_btd, state = relative.relative_layer(p, context.shared, x_btd, context.tokens, state, context.length)
        return x_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Scores by content and by position, and weighted sums."""
        return 8 * positions * width.d * keys(positions, positions)

    def describe(self, width: Width) -> str:
        """Heads."""
        return f"{width.heads} heads"


MIXERS: dict[str, Mixer] = {}


def register(letter: str, mixer: Mixer) -> None:
    """Puts a kind of layer into the table. Raises AtomError for what is no letter, and for one that is taken."""
    if len(letter) != 1 or not letter.isalpha() or letter in MIXERS:
        raise AtomError(f"mixers: expected a letter that no other kind of layer has, got {letter!r}")
    MIXERS[letter] = mixer


register("m", Mamba2())
register("M", Mamba2(mlp=True))
register("t", SelfAttention())
register("T", SelfAttention(mlp=True))
register("l", Landmark())
register("L", Landmark(mlp=True))
register("s", Slots())
register("S", Slots(mlp=True))
register("e", KnnAttention())
register("E", KnnAttention(mlp=True))
register("f", FastWeights())
register("F", FastWeights(mlp=True))
register("n", NeuralMemory())
register("N", NeuralMemory(mlp=True))
register("k", ProductKeys())
register("h", Ngrams())
register("x", Relative(mlp=True))
