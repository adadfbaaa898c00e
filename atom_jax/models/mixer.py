"""What a kind of layer is: the base of those in the table of `mixers`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from atom_jax.kvcache.policy import Policy
from atom_jax.models import attention
from atom_jax.models.attention import Attention, Context
from atom_jax.models.flops import keys
from atom_jax.nn.ssd import Mamba2Config
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
