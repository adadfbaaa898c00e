"""Frames that are pictures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import last_real, previous
from atom_jax.models.hnet.ports import vectors
from atom_jax.models.hnet.ports.vectors import decode, encode, metrics, outlet, read
from atom_jax.nn import vit
from atom_jax.nn.attention import Tokens
from atom_jax.params import ParamSpec, Tree, normal, stack
from atom_jax.typing import AtomError, Frames

__all__ = [
    "FRAMES", "Pixels", "decode", "describe", "empty", "encode", "inlet", "metrics", "nll", "operations", "outlet",
    "outlet_spec", "read", "right", "sample", "spec",
]  # fmt: skip
FRAMES = True


@config.register
@dataclasses.dataclass(frozen=True)
class Pixels:
    """A frame is one position: its patches, each with the same patch of the frame before, so that motion is visible,
    go through layers of a vision transformer, and their mean is its vector. What is foretold is the mean of a normal
    law for every number of the next frame."""

    # Height, width and channels of a frame, numbers in [0, 1].
    grid: tuple[int, ...] = (32, 32, 1)
    # Pixels of a side of a patch.
    patch: int = 8
    # Of the vision transformer, whose heads divide the model's width.
    layers: int = 1
    heads: int = 2
    # Actions to choose one of; 0 = frames follow each other without any.
    actions: int = 0
    # Width of GELU layers.
    hidden: int = 256
    # Standard deviation of what is foretold.
    sigma: float = 0.1

    classes: ClassVar[int] = 0

    def __post_init__(self):
        sizes = {"grid": (1, 4096), "patch": (1, 4096), "layers": (1, 1024), "heads": (1, 1024)}
        config.check(self, actions=(0, 2**20), hidden=(1, 2**24), sigma=(1e-6, 1e3), **sizes)
        if len(self.grid) != 3:
            raise AtomError(f"grid: expected height, width and channels, got {self.grid}")
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise AtomError(f"patch: squares of {self.patch} do not fill frames of {self.grid[0]} x {self.grid[1]}")

    @property
    def numbers(self) -> int:
        """Of a frame."""
        return math.prod(self.grid)

    @property
    def patches(self) -> int:
        """Of a frame."""
        return self.grid[0] * self.grid[1] // self.patch**2


def spec(cfg: Any) -> Tree:
    """pixels (of patches, their places, and layers), action, inlet, and unembed, the outlet. Raises AtomError where
    the heads do not divide the width."""
    port, d = cfg.port, cfg.d_model[0]
    pixels = {
        "patches": vit.affine_spec(2 * port.numbers // port.patches, d),
        "places": ParamSpec((port.patches, d), (None, "embed"), normal(1.0)),
        "layers": stack(vit.block_spec(d, port.hidden, port.heads), port.layers),
    }
    return vectors.spec(d, port.hidden, port.actions) | {"pixels": pixels, "unembed": outlet_spec(cfg, d, 0.02)}


def outlet_spec(cfg: Any, d: int, std: float) -> Tree:
    """Parameters of `read` for states of width d: the matrix [d, height, width, channels], and its bias."""
    grid = cfg.port.grid
    return {
        "w": ParamSpec((d, *grid), ("embed", None, None, None), normal(std)),
        "b": ParamSpec(grid, (None, None, None), normal(0.0)),
    }


def empty(cfg: Any, b: int) -> jax.Array:
    """The latest frame f32 [b, *grid] of every row, black at first."""
    return jnp.zeros((b, *cfg.port.grid), jnp.float32)


def inlet(
    p: Tree, batch: Frames, tokens: Tokens, before: jax.Array | None, cfg: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Vectors [b, t, d] of frames, the latest frame after them, and the share f32 [b, t] of numbers that differ from
    those of the frame before by more than sigma (of an episode's first, from black).

    before: the latest frame of earlier calls, or None.
    """
    port, obs, (b, t) = cfg.port, batch.obs, tokens.positions.shape
    first = (tokens.positions == 0)[..., None, None, None]
    old = jnp.where(first, 0.0, previous(obs, empty(cfg, b) if before is None else before))
    both = jnp.concatenate([obs, old], axis=-1).reshape(b * t, *port.grid[:2], -1)
    x = vit.affine(p["pixels"]["patches"], vit.patches(both, port.patch).astype(cfg.dtype))
    x = x + jnp.broadcast_to(p["pixels"]["places"].astype(x.dtype)[None], x.shape)
    x = vit.blocks(p["pixels"]["layers"], x, vit.everywhere(b * t, port.patches), cfg.norm_eps)
    y_btd = vectors.vectors(p, x.mean(1).reshape(b, t, -1), batch, cfg)
    changed = jnp.mean(jnp.abs(obs - old) > port.sigma, axis=(2, 3, 4), dtype=jnp.float32)
    return y_btd, None if before is None else last_real(obs, tokens, before), changed


def nll(prediction: jax.Array, obs: jax.Array, cfg: Any) -> jax.Array:
    """Nats f32 [b, t] of frames f32 [b, t, *grid], all numbers together, over what a frame that is foretold exactly
    takes."""
    return jnp.sum(jnp.square(obs - prediction), axis=(2, 3, 4)) / (2 * cfg.port.sigma**2)


def sample(prediction: jax.Array, key: jax.Array | None, cfg: Any) -> jax.Array:
    """Frames f32 [b, t, *grid] in [0, 1]: the means, or, with a key, drawn around them."""
    noise = 0.0 if key is None else cfg.port.sigma * jax.random.normal(key, prediction.shape)
    return jnp.clip(prediction + noise, 0.0, 1.0)


def right(found: jax.Array, obs: jax.Array, cfg: Any) -> jax.Array:
    """bool [b, t]: frames whose numbers are sigma off or less, in the quadratic mean."""
    return jnp.sqrt(jnp.mean(jnp.square(found - obs), axis=(2, 3, 4))) <= cfg.port.sigma


def operations(cfg: Any) -> float:
    """Of patches, layers and the outlet, per frame."""
    port, d = cfg.port, cfg.d_model[0]
    layer = port.patches * (4 * d * d + 2 * port.patches * d + 2 * d * port.hidden)
    return 2.0 * (3 * d * port.numbers + port.layers * layer + 2 * d * port.hidden)


def describe(cfg: Any) -> str:
    """The size of frames and patches, and the actions, in words."""
    port = cfg.port
    size = " x ".join(map(str, port.grid))
    return f"{size} numbers in patches of {port.patch} x {port.patch}{vectors.acting(port.actions)}"
