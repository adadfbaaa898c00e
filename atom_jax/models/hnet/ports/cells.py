"""Frames that are grids of cells, each of one of a few classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import last_real, previous
from atom_jax.models.hnet.ports import vectors
from atom_jax.models.hnet.ports.vectors import decode, encode, metrics, outlet, read
from atom_jax.nn.attention import Tokens
from atom_jax.nn.linear import project
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError, Frames

__all__ = [
    "FRAMES", "Cells", "decode", "describe", "empty", "encode", "inlet", "metrics", "nll", "operations", "outlet",
    "outlet_spec", "read", "right", "sample", "spec",
]  # fmt: skip
FRAMES = True
NONE = 255  # in place of the frame before the first one


@config.register
@dataclasses.dataclass(frozen=True)
class Cells:
    """A frame is one position. Its vector is the sum over its cells of an embedding of (cell, class), of another one
    of the frame before, so that motion is visible, and of the action; then a GELU layer with a residual."""

    # Of the grid of a frame.
    grid: tuple[int, ...] = (5, 5)
    # What a cell may hold.
    classes: int = 8
    # Actions to choose one of; 0 = frames follow each other without any.
    actions: int = 0
    # Width of the GELU layer.
    hidden: int = 256

    def __post_init__(self):
        config.check(self, grid=(1, 4096), classes=(2, NONE), actions=(0, 2**20), hidden=(1, 2**24))
        if not self.grid:
            raise AtomError("grid: expected at least one number of cells, got none")

    @property
    def cells(self) -> int:
        """Cells of a frame."""
        return math.prod(self.grid)


def spec(cfg: Any) -> Tree:
    """cells, action, inlet, and unembed, the outlet."""
    port, d = cfg.port, cfg.d_model[0]
    shape, axes = (2, port.cells, port.classes, d), (None, None, "vocab", "embed")
    cells = ParamSpec(shape, axes, normal((2 * port.cells) ** -0.5))
    common = vectors.spec(d, port.hidden, port.actions)
    return common | {"cells": cells, "unembed": outlet_spec(cfg, d, 0.02)}


def outlet_spec(cfg: Any, d: int, std: float) -> Tree:
    """Parameters of `read` for states of width d: the matrix [d, cells, classes], and its bias."""
    port = cfg.port
    return {
        "w": ParamSpec((d, port.cells, port.classes), ("embed", None, "vocab"), normal(std)),
        "b": ParamSpec((port.cells, port.classes), (None, "vocab"), normal(0.0)),
    }


def empty(cfg: Any, b: int) -> jax.Array:
    """The latest frame u8 [b, *grid] of every row, of no class at first."""
    return jnp.full((b, *cfg.port.grid), NONE, jnp.uint8)


def inlet(
    p: Tree, batch: Frames, tokens: Tokens, before: jax.Array | None, cfg: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Vectors [b, t, d] of frames, the latest frame after them, and the share f32 [b, t] of cells that differ from
    the frame before (all of an episode's first).

    before: the latest frame of earlier calls, or None.
    """
    port, obs, (b, t) = cfg.port, batch.obs, tokens.positions.shape
    first = (tokens.positions == 0).reshape(b, t, *[1] * len(port.grid))
    last = empty(cfg, b) if before is None else before
    old = jnp.where(first, jnp.uint8(NONE), previous(obs, last))
    both = jnp.stack([obs, old], axis=2).reshape(b, t, 2, port.cells)
    # Of the frame before the first one all are zero.
    seen = jax.nn.one_hot(both, port.classes, dtype=cfg.dtype)
    x_btd = project(seen, p["cells"], inputs=3)
    y_btd = vectors.vectors(p, x_btd, batch, cfg)
    changed = jnp.mean(both[:, :, 0] != both[:, :, 1], axis=-1, dtype=jnp.float32)
    return y_btd, None if before is None else last_real(obs, tokens, before), changed


def nll(prediction: jax.Array, obs: jax.Array, cfg: Any) -> jax.Array:
    """Nats f32 [b, t] of frames [b, t, *grid], all cells together."""
    b, t, n, _ = prediction.shape
    log = jax.nn.log_softmax(prediction, axis=-1)
    found = jnp.take_along_axis(log, obs.reshape(b, t, n, 1).astype(jnp.int32), axis=-1)
    return -jnp.sum(found[..., 0], axis=-1)


def sample(prediction: jax.Array, key: jax.Array | None, cfg: Any) -> jax.Array:
    """Frames u8 [b, t, *grid]: the likeliest class of every cell, or, with a key, one drawn."""
    found = jnp.argmax(prediction, -1) if key is None else jax.random.categorical(key, prediction)
    return found.reshape(*prediction.shape[:2], *cfg.port.grid).astype(jnp.uint8)


def right(found: jax.Array, obs: jax.Array, cfg: Any) -> jax.Array:
    """bool [b, t]: frames that are others in no cell."""
    return jnp.all(found == obs, axis=tuple(range(2, obs.ndim)))


def operations(cfg: Any) -> float:
    """Of the embedding, the GELU layer and the outlet, per frame."""
    port, d = cfg.port, cfg.d_model[0]
    return 2.0 * d * (3 * port.cells * port.classes + 2 * port.hidden)


def describe(cfg: Any) -> str:
    """The grid, its classes and the actions in words."""
    port = cfg.port
    grid = " x ".join(map(str, port.grid))
    return f"{port.classes} classes in each of {grid} cells{vectors.acting(port.actions)}"
