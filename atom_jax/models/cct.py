"""Compact convolutional transformers (Hassani et al., 2021): classifiers of small images.

Convolutions make a grid of tokens, transformer layers follow, and a softmax over the tokens says how much each counts
for the classes. Tokens can be reduced on the way (`atom_jax.reduction`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config, reduction
from atom_jax.models.family import Kind
from atom_jax.models.flops import matrices
from atom_jax.nn import vit
from atom_jax.params import ParamSpec, Tree, normal, stack
from atom_jax.reduction.blocks import Reduced, blocks
from atom_jax.reduction.types import Reduction
from atom_jax.typing import IMAGES, AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class CCTConfig:
    """Square images, the convolutions that make tokens of them, and the transformer."""

    family: str = "cct"
    # Pixels along a side.
    size: int = 16
    # 1 for gray, 3 for colours.
    channels: int = 1
    classes: int = 10
    # Convolutions, each of kernel x kernel with a ReLU, and after it the greatest of 3 x 3 at every `pool`-th place
    # in both directions (1: no such pooling).
    convolutions: int = 1
    kernel: int = 3
    pool: int = 2
    d_model: int = 48
    d_ff: int = 96
    n_layers: int = 4
    n_heads: int = 4
    norm_eps: float = 1e-5
    # Compute dtype; norms, softmax and logits are float32 in any case.
    dtype: str = "float32"

    # An image is read as a row of bytes, its class as one more.
    vocab_size: ClassVar[int] = 256
    remat: ClassVar[bool] = False

    def __post_init__(self):
        many = (1, 2**16)
        config.check(
            self, size=many, channels=(1, 4), classes=(2, 256), convolutions=(1, 8), kernel=(1, 31), pool=(1, 8),
            d_model=many, d_ff=(1, 2**20), n_layers=(1, 2**10), n_heads=many, norm_eps=(0, 1),
        )  # fmt: skip
        if self.size % self.pool**self.convolutions:
            raise AtomError(f"pool: {self.pool}, {self.convolutions} times, does not divide size {self.size}")
        if self.d_model % self.n_heads:
            raise AtomError(f"n_heads: {self.n_heads} do not divide d_model {self.d_model}")
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in tokens."""
        side = self.size // self.pool**self.convolutions
        return side, side

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def max_length(self) -> int:
        """Bytes of an image and its class."""
        return self.size**2 * self.channels + 1


@struct.dataclass
class Classified:
    """logits f32 [b, classes]; size f32 [b, m] of the tokens left at the end, and where the first ones are now."""

    logits: jax.Array
    size: jax.Array
    trace: Reduction


def spec(cfg: CCTConfig) -> Tree:
    """ParamSpec tree."""
    d, widths = cfg.d_model, [cfg.channels] + [cfg.d_model] * cfg.convolutions
    stem = {
        str(i): ParamSpec(
            (cfg.kernel, cfg.kernel, n, d), (None,) * 3 + ("embed",), normal((2 / n) ** 0.5 / cfg.kernel)
        )
        for i, n in enumerate(widths[:-1])
    }
    return {
        "stem": stem,
        "positions": ParamSpec((cfg.tokens, d), (None, "embed"), normal(0.02)),
        "blocks": stack(vit.block_spec(d, cfg.d_ff, cfg.n_heads, (2 * cfg.n_layers) ** -0.5), cfg.n_layers),
        "norm": vit.norm_spec(d),
        "weigh": vit.affine_spec(d, 1),
        "classes": vit.affine_spec(d, cfg.classes),
    }


def embed(p: Tree, image_bhwc: jax.Array, cfg: CCTConfig) -> jax.Array:
    """Tokens [b, p, d] of images f32 in [0, 1], row after row. Raises AtomError for images of another size."""
    if image_bhwc.shape[1:] != (cfg.size, cfg.size, cfg.channels):
        raise AtomError(f"expected images of {cfg.size} x {cfg.size} x {cfg.channels}, got {image_bhwc.shape[1:]}")
    x = image_bhwc.astype(cfg.dtype)
    for i in range(cfg.convolutions):
        kernel = p["stem"][str(i)].astype(x.dtype)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x)
        if cfg.pool > 1:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, cfg.pool, cfg.pool, 1), "SAME")
    x_bpd = x.reshape(x.shape[0], -1, cfg.d_model)
    return x_bpd + jnp.broadcast_to(p["positions"].astype(x.dtype), x_bpd.shape)


def classify(
    p: Tree, image_bhwc: jax.Array, cfg: CCTConfig, reducers: tuple[Any, ...] = (), proportional: bool = True
) -> Classified:
    """Classes of images f32 [b, height, width, channels] in [0, 1].

    reducers: a configuration or None for every layer; (): no tokens are reduced. proportional: tokens count as often
        as those that they stand for, in attention and for the classes (the latter is ours: ToMe's models have no
        pooling that is learned).
    """
    x_bpd = embed(p, image_bhwc, cfg)
    b, n, _ = x_bpd.shape
    if reducers:
        options = {"grid": cfg.grid, "proportional": proportional}
        found = blocks(p["blocks"], x_bpd, reducers, cfg.norm_eps, **options)
    else:
        x_bpd = vit.blocks(p["blocks"], x_bpd, vit.everywhere(b, n), cfg.norm_eps)
        found = Reduced(x_bpd, jnp.ones((b, n)), reduction.identity(b, n))
    x_bmd = vit.norm(p["norm"], found.x, cfg.norm_eps).astype(jnp.float32)
    score_bm = vit.affine(p["weigh"], x_bmd)[..., 0]
    if proportional:
        score_bm += jnp.log(jnp.maximum(found.size, 1e-9))
    weight_bm = jax.nn.softmax(jnp.where(found.size > 0, score_bm, -jnp.inf), axis=-1)
    logits = vit.affine(p["classes"], jnp.einsum("bm,bmd->bd", weight_bm, x_bmd))
    return Classified(logits, found.size, found.trace)


def left(cfg: CCTConfig, reducers: tuple[Any, ...] = ()) -> list[int]:
    """Tokens in the second half of every layer, where the reducers have acted."""
    out, n = [], cfg.tokens
    for reducer in reducers or (None,) * cfg.n_layers:
        n = n if reducer is None else reduction.tokens(reducer, n)
        out.append(n)
    return out


def image_flops(cfg: CCTConfig, reducers: tuple[Any, ...] = ()) -> float:
    """Operations for one image, as `Kind.flops` counts them, with those of the reducers."""
    d, side, total, n = cfg.d_model, cfg.size, 0.0, cfg.tokens
    for width in [cfg.channels] + [d] * (cfg.convolutions - 1):
        total += 2.0 * side**2 * cfg.kernel**2 * width * d
        side //= cfg.pool
    layer = vit.block_spec(d, cfg.d_ff, cfg.n_heads)
    own, fed = matrices({k: layer[k] for k in ("qkv", "o")}), matrices({k: layer[k] for k in ("up", "down")})
    for reducer, after in zip(reducers or (None,) * cfg.n_layers, left(cfg, reducers)):
        total += 2.0 * n * own + 4.0 * n * n * d + 2.0 * after * fed
        if reducer is not None:
            total += reduction.of(reducer).flops(reducer, n, d, d // cfg.n_heads)
        n = after
    return total + 4.0 * n * d + 2.0 * d * cfg.classes


def flops(cfg: CCTConfig, length: int) -> float:
    """See `Kind`; tokens are bytes of images and their classes here."""
    return image_flops(cfg) / cfg.max_length


def describe(cfg: CCTConfig) -> list[tuple[str, str]]:
    """See `Kind`."""
    colours = {1: "gray"}.get(cfg.channels, f"{cfg.channels} channels")
    return [
        ("images", f"{cfg.size} x {cfg.size}, {colours}, {cfg.classes} classes"),
        (
            "tokens",
            f"{cfg.grid[0]} x {cfg.grid[1]} after {cfg.convolutions} convolutions of {cfg.kernel} x {cfg.kernel}",
        ),
        ("layers", f"{cfg.n_layers}, width {cfg.d_model}, MLP {cfg.d_ff}, {cfg.n_heads} heads"),
    ]


def examples() -> dict[str, CCTConfig]:
    """See `Kind`."""
    small = CCTConfig(size=8, d_model=16, d_ff=24, n_layers=2, n_heads=2)
    colours = dataclasses.replace(small, channels=3, convolutions=2, pool=1, classes=3)
    return {"gray": small, "colours": colours}


KIND = Kind(name="cct", config=CCTConfig, spec=spec, flops=flops, describe=describe, examples=examples, reads=IMAGES)
