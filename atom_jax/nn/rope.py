"""Rotary position embeddings in the half-split layout, with the published ways to stretch them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.typing import AtomError

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model's frequencies were stretched beyond its first context length."""

    kind: str
    # How many times longer the context became.
    factor: float = 1.0
    # Context length, in tokens, before stretching (llama3, yarn).
    original_max_length: int = 8192
    # Wavelength limits as fractions of the original length (llama3).
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # Rotations over the original length between which frequencies blend (yarn).
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Multiplies cos and sin (yarn); None means 0.1 ln(factor) + 1.
    attention_factor: float | None = None

    def __post_init__(self):
        positive = (1e-6, 1e9)
        config.check(
            self, factor=positive, original_max_length=(1, 2**31 - 1), low_freq_factor=positive,
            high_freq_factor=positive, beta_fast=positive, beta_slow=positive, attention_factor=positive,
        )  # fmt: skip
        if self.kind not in KINDS:
            raise AtomError(f"rope_scaling: unknown kind {self.kind!r}; known: {', '.join(KINDS)}")


def frequencies(k: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Angular frequencies float64 [k/2] in radians per token, and the factor on cos and sin.

    Sources: RoFormer (Su et al., 2021); llama3: the Llama 3.1 release; YaRN: Peng et al., 2023, section 3.
    """
    freq = theta ** (-np.arange(0, k, 2, dtype=np.float64) / k)
    if scaling is None:
        return freq, 1.0
    if scaling.kind == "linear":
        return freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_max_length * freq / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return freq * (keep + (1 - keep) / scaling.factor), 1.0

    def dimension(rotations: float) -> float:
        ratio = scaling.original_max_length / (rotations * 2 * math.pi)
        return k * math.log(ratio) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), k - 1)
    stretch = np.clip((np.arange(k // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return freq * (1 - stretch + stretch / scaling.factor), factor


def tables(
    positions: jax.Array, k: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [b, t, 1, k/2], for integer positions [b, t]."""
    freq, factor = frequencies(k, theta, scaling)
    angle = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(freq, jnp.float32)[None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_bthk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + r/2) of the first r channels of queries or keys [b, t, h, k], for tables of r/2
    angles; float32 inside, dtype of x outside."""
    if (r := 2 * cos.shape[-1]) < x_bthk.shape[-1]:
        return jnp.concatenate([rotate(x_bthk[..., :r], cos, sin), x_bthk[..., r:]], axis=-1)
    a, b = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_bthk.dtype)
