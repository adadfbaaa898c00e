"""Frames that are pictures, read as the codes of a tokenizer of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import last_real, previous
from atom_jax.models import image_tokens
from atom_jax.models.hnet.ports import vectors
from atom_jax.models.hnet.ports.cells import nll
from atom_jax.models.hnet.ports.vectors import metrics, outlet, read
from atom_jax.models.image_tokens import FSQ, ImageTokensConfig, lengths
from atom_jax.nn import vit
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError, Frames

__all__ = [
    "FRAMES", "Codes", "decode", "describe", "empty", "encode", "inlet", "metrics", "nll", "operations", "outlet",
    "outlet_spec", "parts", "read", "right", "sample", "spec",
]  # fmt: skip
FRAMES = True


def _small() -> ImageTokensConfig:
    return ImageTokensConfig(size=32, patch=8, registers=8, quantiser=FSQ((8, 5, 5)))


@config.register
@dataclasses.dataclass(frozen=True)
class Codes:
    """A frame is one position: a tokenizer of images makes codes of it, and its vector is the sum of an embedding of
    (register, code), and of another one of the frame before. Registers that a frame needs no token of add nothing.
    What is foretold is the code of every register, or that it has none.

    The tokenizer is trained before and stays as it is; its parameters are the model's.
    """

    tokenizer: ImageTokensConfig = dataclasses.field(default_factory=_small)
    # Mean squared error of a frame, which gets the fewest tokens that are within it; where none are, those with the
    # smallest error.
    error: float = 0.003
    # Actions to choose one of; 0 = frames follow each other without any.
    actions: int = 0
    # Width of the GELU layer.
    hidden: int = 256

    classes: ClassVar[int] = 0

    def __post_init__(self):
        config.check(self, error=(0, 1e6), actions=(0, 2**20), hidden=(1, 2**24))
        if not self.tokenizer.quantiser.codes:
            raise AtomError(f"tokenizer: {type(self.tokenizer.quantiser).__name__} makes no codes of an image")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Height, width and channels of a frame, numbers in [0, 1]."""
        return self.tokenizer.size, self.tokenizer.size, self.tokenizer.channels

    @property
    def absent(self) -> int:
        """What stands for a register without a token, the number after all codes."""
        return self.tokenizer.quantiser.codes


def parts(cfg: Any) -> dict[str, ImageTokensConfig]:
    """The tokenizer."""
    return {"tokenizer": cfg.port.tokenizer}


def spec(cfg: Any) -> Tree:
    """tokenizer, codes, action, inlet, and unembed, the outlet."""
    port, d = cfg.port, cfg.d_model[0]
    r = port.tokenizer.registers
    codes = ParamSpec((2 * r * port.absent, d), ("vocab", "embed"), normal((2 * r) ** -0.5))
    own = {"tokenizer": image_tokens.spec(port.tokenizer), "codes": codes, "unembed": outlet_spec(cfg, d, 0.02)}
    return vectors.spec(d, port.hidden, port.actions) | own


def outlet_spec(cfg: Any, d: int, std: float) -> Tree:
    """Parameters of `read` for states of width d: the matrix [d, registers, codes + 1], and its bias."""
    shape = (cfg.port.tokenizer.registers, cfg.port.absent + 1)
    return {
        "w": ParamSpec((d, *shape), ("embed", None, "vocab"), normal(std)),
        "b": ParamSpec(shape, (None, "vocab"), normal(0.0)),
    }


def encode(p: Tree, obs: jax.Array, cfg: Any) -> jax.Array:
    """Codes i32 [b, t, r] of frames f32 [b, t, *grid], `Codes.absent` where there is no token."""
    port, own = cfg.port, cfg.port.tokenizer
    frozen = jax.tree.map(jax.lax.stop_gradient, p["tokenizer"])

    def one(obs: jax.Array) -> jax.Array:
        x_bpc = vit.patches(obs, own.patch)
        found = own.length.choices(frozen, x_bpc, own)
        errors = jnp.mean(jnp.square(jnp.clip(found.patches, 0.0, 1.0) - x_bpc[None]), axis=(2, 3))
        at = lengths.within(found.tokens, errors, port.error)
        return jnp.take_along_axis(found.index, at[None, :, None], axis=0)[0]

    index = _each(one, obs)
    return jnp.where(index < 0, port.absent, index)


def decode(p: Tree, codes: jax.Array, cfg: Any) -> jax.Array:
    """Frames f32 [b, t, *grid] of codes i32 [b, t, r]."""
    port, own = cfg.port, cfg.port.tokenizer
    index = jnp.where(codes < port.absent, codes, -1)
    return _each(lambda index: image_tokens.image(p["tokenizer"], index, own), index)


def _each(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f of the frames [b, ...] of every position of x [b, t, ...], one position after the other: all lengths of all
    frames at once would not fit into memory."""
    return jnp.moveaxis(jax.lax.map(f, jnp.moveaxis(x, 1, 0)), 0, 1)


def empty(cfg: Any, b: int) -> jax.Array:
    """The latest codes i32 [b, r] of every row, none at first."""
    return jnp.full((b, cfg.port.tokenizer.registers), cfg.port.absent, jnp.int32)


def inlet(
    p: Tree, batch: Frames, tokens: Tokens, before: jax.Array | None, cfg: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Vectors [b, t, d] of frames as `encode` gives them, the latest codes after them, and the share f32 [b, t] of
    registers that differ from the frame before (of an episode's first, from a frame without tokens).

    before: the latest codes of earlier calls, or None.
    """
    port, obs, (b, t, r) = cfg.port, batch.obs, batch.obs.shape
    old = previous(obs, empty(cfg, b) if before is None else before)
    old = jnp.where((tokens.positions == 0)[..., None], port.absent, old)
    both = jnp.concatenate([obs, old], axis=-1)
    rows = jnp.arange(2 * r, dtype=jnp.int32)[None, None] * port.absent + jnp.minimum(both, port.absent - 1)
    x = lookup(p["codes"], rows.reshape(b, t * 2 * r), cfg.dtype).reshape(b, t, 2 * r, -1)
    x_btd = jnp.sum(jnp.where((both < port.absent)[..., None], x, 0), axis=2)
    y_btd = vectors.vectors(p, x_btd, batch, cfg)
    changed = jnp.mean(obs != old, axis=-1, dtype=jnp.float32)
    return y_btd, None if before is None else last_real(obs, tokens, before), changed


def sample(prediction: jax.Array, key: jax.Array | None, cfg: Any) -> jax.Array:
    """Codes i32 [b, t, r]: the likeliest of every register, or, with a key, one drawn."""
    found = jnp.argmax(prediction, -1) if key is None else jax.random.categorical(key, prediction)
    return found.astype(jnp.int32)


def right(found: jax.Array, obs: jax.Array, cfg: Any) -> jax.Array:
    """bool [b, t]: frames whose mean squared error is no more than the tokenizer may make."""
    return jnp.mean(jnp.square(found - obs), axis=(2, 3, 4)) <= cfg.port.error


def operations(cfg: Any) -> float:
    """Of the tokenizer, which tries all of its lengths, the GELU layer and the outlet, per frame."""
    port, own, d = cfg.port, cfg.port.tokenizer, cfg.d_model[0]
    tried = image_tokens.operations(own, own.length.tries(own))
    return tried + 2.0 * d * (own.registers * (port.absent + 1) + 2 * port.hidden)


def describe(cfg: Any) -> str:
    """The tokenizer and the actions in words."""
    port, own = cfg.port, cfg.port.tokenizer
    size = " x ".join(map(str, port.grid))
    return f"{size} numbers as up to {own.registers} of {port.absent:,} codes{vectors.acting(port.actions)}"
