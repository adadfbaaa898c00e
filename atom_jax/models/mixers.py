"""The kinds of layers that a layout may name, in a table by their letter.

    m  Mamba-2                 M  Mamba-2, then SwiGLU
    t  causal attention        T  causal attention, then SwiGLU
    l  landmark attention      L  landmark attention, then SwiGLU
    f  fast weights            F  fast weights, then SwiGLU
    n  neural memory           N  neural memory, then SwiGLU
    k  product keys, a table of values of which every position reads few (in the place of an MLP)
    x  the post-norm Transformer-XL layer of dynamic token pooling (attention with relative positions, then GELU MLP)

All but x are pre-norm with a residual carried in float32. A new kind is a `Mixer` and one call of `register`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.landmark import LandmarkLayer
from atom_jax.kvcache.policy import Policy
from atom_jax.models import attention
from atom_jax.models.attention import Attention, Context
from atom_jax.models.flops import keys
from atom_jax.nn import fast_weights, landmark, neural_memory, product_keys, relative
from atom_jax.nn.ssd import Mamba2Config, MambaState, mamba2, mamba2_spec
from atom_jax.params import ParamSpec, Tree, normal, ones
from atom_jax.typing import AtomError


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


class Mixer:
    """A kind of layer: a mixer of positions in a pre-norm residual, with a SwiGLU after it or not.

    mlp: whether it has one. whole: `apply` is all of the layer, and has its own residuals, norms and MLP. exact: the
    layer's parameters stay as they are; else they are cast to the compute dtype first.
    """

    whole: bool = False
    exact: bool = False

    def __init__(self, mlp: bool = False):
        self.mlp = mlp

    def check(self, width: Width, where: str) -> None:
        """Raises AtomError for a stage, called `where`, whose sizes the layer cannot have."""

    def spec(self, width: Width, out_scale: float) -> Tree:
        """Parameters. out_scale: factor on the initial values of matrices that write to the residual stream."""
        raise NotImplementedError

    def kind(self, width: Width, policy: Policy | None) -> Any:
        """What tells apart layers of a run (`layers.runs`), with a hash: an `Attention`, or None where all are
        alike. policy: of a layer whose queries see all."""
        return None

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> Any:
        """The memory of b rows of one layer before the first position, with room for `capacity` positions (not of an
        `Attention`, which has its own): a `layer.Layer`, or arrays with rows in front."""
        raise NotImplementedError

    def apply(
        self, p: Tree, x_btd: jax.Array, y_btd: jax.Array, state: Any, kind: Any, width: Width, context: Context,
        others: tuple,
    ) -> tuple[jax.Array, Any, dict[str, Any]]:  # fmt: skip
        """Outputs [b, t, d] for inputs y (the layer's, x, after its norm), the memory afterwards (None for None), and
        what is to be reported, by name. p: parameters. kind: as from `kind`; others: see `Context.over`.
        """
        raise NotImplementedError

    def operations(self, width: Width, positions: int) -> float:
        """Floating-point operations in which positions of one row meet."""
        raise NotImplementedError

    def describe(self, width: Width) -> str:
        """What a line of `info` says of it."""
        raise NotImplementedError


class Heads(Mixer):
    """Of heads that share the width."""

    def check(self, width: Width, where: str) -> None:
        """Heads divide the width."""
        if width.d % width.heads:
            raise AtomError(f"n_heads: {width.heads} heads do not divide the width {width.d} of {where}")


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


class SelfAttention(Heads):
    """t and T."""

    def check(self, width: Width, where: str) -> None:
        """Heads divide the width, and RoPE turns an even number of their channels."""
        super().check(width, where)
        if width.rotary % 2 or not 0 <= width.rotary <= width.head_dim:
            raise AtomError(
                f"rotary_dim: expected an even number up to {width.head_dim} in {where}, got {width.rotary}"
            )

    def spec(self, width: Width, out_scale: float) -> Tree:
        """Projections, and norms of queries and keys."""
        d, n, k, std = width.d, width.heads, width.head_dim, width.std
        spec = {
            "qkv": ParamSpec((d, 3, n, k), ("embed", "parts", "heads", None), normal(std)),
            "o": ParamSpec((n, k, d), ("heads", None, "embed"), normal(std * out_scale)),
        }
        return spec | {name: ParamSpec((k,), (None,), ones) for name in ("q_norm", "k_norm") if width.qk_norm}

    def kind(self, width: Width, policy: Policy | None) -> Attention:
        """As many key heads as query heads."""
        window = None if width.window < 0 else width.window + 1
        n = width.heads
        return Attention(n, n, width.head_dim, width.rotary, (10000.0, None), window, width.eps, policy)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `attention.attention`."""
        return attention.attention(p, x_btd, y_btd, state, kind, context, others)[:3]

    def operations(self, width: Width, positions: int) -> float:
        """Scores and weighted sums."""
        window = positions if width.window < 0 else width.window + 1
        return 4 * positions * width.d * keys(positions, window)

    def describe(self, width: Width) -> str:
        """Heads, and what they see."""
        return f"{width.heads} heads" + (f" with a window of {width.window + 1}" if width.window >= 0 else "")


class Landmark(SelfAttention):
    """l and L. every: positions of a block; nearest: blocks that are read besides the own one, 0: all."""

    def __init__(self, mlp: bool = False, every: int = landmark.EVERY, nearest: int = 0):
        super().__init__(mlp)
        self.every, self.nearest = every, nearest

    def check(self, width: Width, where: str) -> None:
        """As of attention, without a window."""
        super().check(width, where)
        if width.window >= 0:
            raise AtomError(f"window: landmark attention in {where} has none, got {width.window}")

    def spec(self, width: Width, out_scale: float) -> Tree:
        """With a projection to the keys of landmarks."""
        d, n, k = width.d, width.heads, width.head_dim
        mark = ParamSpec((d, n, k), ("embed", "heads", None), normal(width.std))
        return super().spec(width, out_scale) | {"mark": mark}

    def kind(self, width: Width, policy: Policy | None) -> None:
        """All layers are alike, and have no cache policy."""
        return None

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> LandmarkLayer:
        """Keys and values of all before, and landmarks."""
        return LandmarkLayer.empty(b, width.heads, capacity, width.head_dim, self.every, self.nearest, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `landmark.layer`."""
        y_btd, state = landmark.layer(
            p, y_btd, context.tokens, state, context.length, rotary=width.rotary, eps=width.eps, every=self.every,
            nearest=self.nearest,
        )  # fmt: skip
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Those of attention, and scores of landmarks."""
        return super().operations(width, positions) * (1 + 0.5 / self.every)

    def describe(self, width: Width) -> str:
        """Heads, and what they read."""
        read = f", of which {self.nearest} are read" if self.nearest else ""
        return f"{width.heads} heads with landmarks of blocks of {self.every}{read}"


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


class FastWeights(Heads):
    """f and F."""

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `fast_weights.layer`."""
        return fast_weights.layer_spec(width.d, width.heads, width.std, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> jax.Array:
        """A matrix per head."""
        return jnp.zeros((b, width.heads, width.head_dim, width.head_dim), jnp.float32)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `fast_weights.layer`."""
        y_btd, state = fast_weights.layer(p, y_btd, context.tokens, state)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Products inside a chunk, the triangular system, and those with the matrices."""
        chunk = min(fast_weights.CHUNK, positions)
        return positions * width.d * (7 * chunk + 6 * width.head_dim)

    def describe(self, width: Width) -> str:
        """Sizes of the matrices."""
        return f"{width.heads} fast weights of {width.head_dim} x {width.head_dim}"


class NeuralMemory(Heads):
    """n and N."""

    exact = True

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `neural_memory.layer_spec`, with networks of two matrices."""
        return neural_memory.layer_spec(width.d, width.heads, width.std, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> neural_memory.NeuralState:
        """Weights of every row."""
        return neural_memory.NeuralState.empty(b, width.d, width.heads)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `neural_memory.layer`."""
        y_btd, state = neural_memory.layer(p, y_btd, context.tokens, state)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """The networks for what is looked up, twice more, and for what is stored, with their gradients."""
        return positions * width.d * 4 * neural_memory.WIDER * width.head_dim * 5

    def describe(self, width: Width) -> str:
        """Sizes of the networks."""
        k = width.head_dim
        return f"{width.heads} neural memories of {k} x {neural_memory.WIDER * k}"


class ProductKeys(Mixer):
    """k. keys: per half; the table has the square of that. heads: what looks something up; nearest: how much each."""

    def __init__(
        self, keys: int = product_keys.KEYS, heads: int = product_keys.HEADS, nearest: int = product_keys.NEAREST
    ):
        super().__init__()
        self.keys, self.heads, self.nearest = keys, heads, nearest

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `product_keys.layer_spec`."""
        return product_keys.layer_spec(width.d, width.std, out_scale, self.keys, self.heads)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> jax.Array:
        """Nothing: positions are read by themselves."""
        return jnp.zeros((b, 0), dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `product_keys.layer`."""
        return product_keys.layer(p, y_btd, self.nearest), state, {}

    def operations(self, width: Width, positions: int) -> float:
        """What is read of the table, in place of all of it, which counts among the matrices."""
        return positions * 2 * width.d * (self.heads * self.nearest - self.keys**2)

    def describe(self, width: Width) -> str:
        """Size of the table."""
        return f"a table of {self.keys**2:,} values, {self.heads * self.nearest} read by each position"


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
register("f", FastWeights())
register("F", FastWeights(mlp=True))
register("n", NeuralMemory())
register("N", NeuralMemory(mlp=True))
register("k", ProductKeys())
register("x", Relative(mlp=True))
