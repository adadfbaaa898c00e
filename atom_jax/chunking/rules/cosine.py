"""H-Net's router: a unit starts where a state differs in direction from the one before (Hwang et al., 2025,
"Dynamic Chunking for End-to-End Hierarchical Sequence Modeling", section 2.2)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking.types import START, Boundary, Seen, Tree, last_real, previous
from atom_jax.nn.linear import project
from atom_jax.params import ParamSpec
from atom_jax.typing import AtomError

KIND = START
HAS_P = True


@config.register
@dataclasses.dataclass(frozen=True)
class Cosine:
    """Starts where half the cosine distance between projected neighbours exceeds 1/2."""

    # Positions per chunk that the ratio loss steers towards; above 1, may be fractional.
    target: float = 6.0
    # Factor on the ratio loss.
    weight: float = 0.03
    # Averages of the ratio loss run over padding too, as the official code has it.
    official_padding: bool = False

    def __post_init__(self):
        config.check(self, target=(1, 1e9), weight=(0, 1e6))
        if self.target <= 1:
            raise AtomError(f"target: expected more than 1 position per chunk, got {self.target}")


def spec(cfg: Cosine, d: int) -> Tree:
    """Projections [d in, d out] of the previous ("q") and the current state ("k"), at first the identity."""

    def identity(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.eye(*shape, dtype=dtype)

    return {name: ParamSpec((d, d), ("embed", None), identity) for name in "qk"}


def init_state(cfg: Cosine, d: int, b: int) -> jax.Array:
    """The latest state of every row, f32 [b, d]."""
    return jnp.zeros((b, d), jnp.float32)


def apply(p: Tree, seen: Seen, state: jax.Array, *, cfg: Cosine) -> tuple[Boundary, jax.Array]:
    """START marks where p > 1/2; a document's first position has p = 1. Everything is float32.

    p at padding is finite and means nothing. `loss` is the weighted ratio loss of this call's positions.
    """
    h_btd = seen.h.astype(jnp.float32)
    real = seen.tokens.segments > 0
    # Accelerators multiply float32 matrices in bfloat16 unless told otherwise; that flips decisions near 1/2.
    with jax.default_matmul_precision("highest"):
        q_btd = project(previous(h_btd, state), p["q"])
        k_btd = project(h_btd, p["k"])
    cosine = jnp.sum(direction(q_btd) * direction(k_btd), axis=-1)
    prob = jnp.where(real & (seen.tokens.positions == 0), 1.0, jnp.clip((1 - cosine) / 2, 0.0, 1.0))
    mark = real & (prob > 0.5)
    loss = cfg.weight * ratio_loss(prob, mark, None if cfg.official_padding else real, cfg.target)
    return Boundary(mark, p=prob, loss=loss, kind=START), last_real(h_btd, seen.tokens, state)


def ratio_loss(p_bt: jax.Array, mark_bt: jax.Array, real_bt: jax.Array | None, target: float) -> jax.Array:
    """H-Net's ratio loss f32 [] (section 2.3): N / (N - 1) ((N - 1) F G + (1 - F)(1 - G)), where F is the share of
    marks, G the mean probability, N the target. Means run over `real_bt`, or over all positions without it."""
    weights = jnp.ones(p_bt.shape, jnp.float32) if real_bt is None else real_bt.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weights), 1.0)
    f, g = jnp.sum(mark_bt * weights) / total, jnp.sum(p_bt * weights) / total
    return target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g))


def direction(x_btd: jax.Array) -> jax.Array:
    """Unit vectors. The bound goes under the root, whose derivative at 0 is infinite."""
    return x_btd * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_btd * x_btd, axis=-1, keepdims=True), 1e-24))
