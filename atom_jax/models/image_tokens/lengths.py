"""How many tokens an image gets: none to choose, the first k of them, or k that the encoder is told of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.models.image_tokens import forward
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError

# Lengths that are tried where there are more registers, from one to all of them by equal factors.
MOST_TRIED = 100
RULES = ("uniform", "pow2", "uniform_pow2")


@struct.dataclass
class Trained:
    """Of images in training: patches f32 [b, p, c] as they came out; loss f32 [], what is minimised, a mean over all
    numbers; said: figures f32 [] by name, means over the images."""

    patches: jax.Array
    loss: jax.Array
    said: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class Choices:
    """Every length that a tokenizer offers for b images, n of them, from what should need the fewest tokens on.

    tokens: i32 [n, b] used; patches: f32 [n, b, p, c] decoded from these; index: i32 [n, b, r] the codes, -1 where a
    token is not kept; None where there are no codes.
    """

    tokens: jax.Array
    patches: jax.Array
    index: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Length:
    """Base of all: what the parts of a tokenizer ask of how its length varies. `dropped`: as in `forward.decode`."""

    dropped = "mask"

    def check(self, cfg: Any) -> None:
        """Raises AtomError for what does not go with the other fields of a configuration."""

    def spec(self, cfg: Any) -> dict[str, Tree]:
        """ParamSpecs of parameters besides those of every tokenizer, by "encoder" and "decoder"."""
        return {}

    def labels(self, cfg: Any) -> list[str]:
        """What each of `choices` is called."""
        raise NotImplementedError

    def passes(self, cfg: Any) -> tuple[float, float]:
        """Passes through encoder and decoder that the forward pass of a training step makes."""
        return 1.0, 1.0

    def tries(self, cfg: Any) -> tuple[float, float]:
        """Passes through encoder and decoder that `choices` makes."""
        return float(len(self.labels(cfg))), float(len(self.labels(cfg)))

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        """One pass with what is drawn by `key`."""
        raise NotImplementedError

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        """All lengths at once."""
        raise NotImplementedError


@config.register
@dataclasses.dataclass(frozen=True)
class Whole(Length):
    """Every image is all of the registers."""

    def labels(self, cfg: Any) -> list[str]:
        return [str(cfg.registers)]

    def tries(self, cfg: Any) -> tuple[float, float]:
        return 1.0, float(len(self.labels(cfg)))

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        return cut(p, x_bpc, jnp.full(len(x_bpc), cfg.registers), cfg)

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        return prefixes(p, x_bpc, [cfg.registers], cfg)


@config.register
@dataclasses.dataclass(frozen=True)
class Nested(Length):
    """The first k registers, with k drawn for each image in training: nested dropout (Rippel et al., 2014), as in
    FlexTok (Bachmann et al., 2025). The encoder does not know of k, so one encoding serves all lengths.

    rule: how k is drawn: "uniform" in least to r, "pow2" among the powers of two (and r, where it is none), or
    "uniform_pow2", uniform and rounded up to such a number. FlexTok's code can exceed r, where that is no power of
    two; this doesn't. least: tokens at least. dropped: the decoder does not see the others ("mask"), or one learned
    vector in their place ("vector", as FlexTok).
    """

    rule: str = "uniform"
    least: int = 1
    dropped: str = "mask"

    def __post_init__(self):
        config.check(self, least=(1, 2**16))
        if self.rule not in RULES:
            raise AtomError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        if self.dropped not in ("mask", "vector"):
            raise AtomError(f"dropped: expected mask or vector, got {self.dropped!r}")

    def check(self, cfg: Any) -> None:
        if self.least > cfg.registers:
            raise AtomError(f"length.least: there are only {cfg.registers} registers, got {self.least}")

    def spec(self, cfg: Any) -> dict[str, Tree]:
        if self.dropped == "mask":
            return {}
        return {"decoder": {"dropped": ParamSpec((cfg.quantiser.width,), (None,), normal(0.02))}}

    def labels(self, cfg: Any) -> list[str]:
        return [str(k) for k in tried(self.least, cfg.registers)]

    def tries(self, cfg: Any) -> tuple[float, float]:
        return 1.0, float(len(self.labels(cfg)))

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        return cut(p, x_bpc, drawn(key, len(x_bpc), self.rule, self.least, cfg.registers), cfg)

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        return prefixes(p, x_bpc, tried(self.least, cfg.registers), cfg)


@config.register
@dataclasses.dataclass(frozen=True)
class Told(Length):
    """The first k registers, uniform in least to r, where the encoder is told which (an embedding added to each
    register), and the others are zeros to the decoder: as ElasticTok (Yan et al., 2024) has it, for single images.

    ElasticTok's code keeps one token more than k; this doesn't.
    """

    least: int = 1

    dropped: ClassVar[str] = "zero"

    def __post_init__(self):
        config.check(self, least=(1, 2**16))

    def check(self, cfg: Any) -> None:
        if self.least > cfg.registers:
            raise AtomError(f"length.least: there are only {cfg.registers} registers, got {self.least}")

    def spec(self, cfg: Any) -> dict[str, Tree]:
        return {"encoder": {"told": vectors(2, cfg.d_model)}}

    def labels(self, cfg: Any) -> list[str]:
        return [str(k) for k in tried(self.least, cfg.registers)]

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        return cut(p, x_bpc, drawn(key, len(x_bpc), "uniform", self.least, cfg.registers), cfg, told=True)

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        return prefixes(p, x_bpc, tried(self.least, cfg.registers), cfg, told=True)


def vectors(*shape: int) -> ParamSpec:
    """Learned vectors [..., d] that are added to others, about as large as these, so that tokens can be told apart
    from the beginning."""
    return ParamSpec(shape, (None,) * (len(shape) - 1) + ("embed",), normal(0.5))


def drawn(key: jax.Array, b: int, rule: str, least: int, r: int) -> jax.Array:
    """Tokens i32 [b] that are kept, from `least` to r; rule: as in `Nested`."""
    powers = np.array(sorted({r, *(2**i for i in range(r.bit_length()) if least <= 2**i <= r)}), np.int32)
    if rule == "pow2":
        return jax.random.choice(key, powers, (b,))
    k = jax.random.randint(key, (b,), least, r + 1)
    return k if rule == "uniform" else jnp.asarray(powers)[jnp.searchsorted(powers, k)]


def tried(least: int, r: int) -> list[int]:
    """Lengths from `least` to r: all, or MOST_TRIED that rise by equal factors."""
    if r - least < MOST_TRIED:
        return list(range(least, r + 1))
    return sorted({round(k) for k in np.geomspace(least, r, MOST_TRIED)})


def within(tokens_nb: jax.Array, errors_nb: jax.Array, error: float) -> jax.Array:
    """i32 [b]: of each image the offer with the fewest tokens whose error is at most `error`, of several the one with
    the smallest error; where none is, that of all."""
    passes = errors_nb <= error
    found = cheapest(jnp.where(passes, tokens_nb, jnp.iinfo(jnp.int32).max), errors_nb)
    return jnp.where(passes.any(axis=0), found, errors_nb.argmin(axis=0)).astype(jnp.int32)


def cheapest(cost_nb: jax.Array, errors_nb: jax.Array) -> jax.Array:
    """i32 [b]: of each image the offer with the smallest error among those of the smallest cost."""
    least = cost_nb == cost_nb.min(axis=0, keepdims=True)
    return jnp.where(least, errors_nb, jnp.inf).argmin(axis=0).astype(jnp.int32)


def first(k: jax.Array, r: int) -> jax.Array:
    """bool [..., r]: True for the first k [...] of r registers."""
    return jnp.arange(r).reshape((1,) * k.ndim + (r,)) < k[..., None]


def cut(p: Tree, x_bpc: jax.Array, k_b: jax.Array, cfg: Any, told: bool = False) -> Trained:
    """Images encoded, and decoded from their first k tokens. told: the encoder knows k."""
    keep_br = first(k_b, cfg.registers)
    found = forward.quantise(p, forward.encode(p, x_bpc, cfg, keep_br if told else None), cfg)
    out = forward.decode(p, found.z, keep_br, cfg)
    error = jnp.mean(jnp.square(out - x_bpc))
    return Trained(out, error + found.loss_of(keep_br), {"tokens": jnp.mean(k_b.astype(jnp.float32))})


def prefixes(p: Tree, x_bpc: jax.Array, ks: list[int], cfg: Any, told: bool = False) -> Choices:
    """Images decoded from their first k tokens, for every one of `ks`, in one call."""
    b, r = len(x_bpc), cfg.registers
    keep_nbr = first(jnp.broadcast_to(jnp.array(ks, jnp.int32)[:, None], (len(ks), b)), r)
    if told:
        found = jax.vmap(lambda keep: forward.quantise(p, forward.encode(p, x_bpc, cfg, keep), cfg))(keep_nbr)
        out = jax.vmap(lambda z, keep: forward.decode(p, z, keep, cfg))(found.z, keep_nbr)
        index = found.index
    else:
        found = forward.quantise(p, forward.encode(p, x_bpc, cfg), cfg)
        out = jax.vmap(lambda keep: forward.decode(p, found.z, keep, cfg))(keep_nbr)
        index = None if found.index is None else jnp.broadcast_to(found.index, keep_nbr.shape)
    index = None if index is None else jnp.where(keep_nbr, index, -1)
    return Choices(jnp.sum(keep_nbr, axis=-1, dtype=jnp.int32), out, index)
