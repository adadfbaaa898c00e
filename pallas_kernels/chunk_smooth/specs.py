"""Shapes at which `chunk_smooth` is compiled: those of H-Net's outermost stage, 8192 bytes in chunks of about six."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_smooth.api import chunk_smooth

B, M, D = 8, 1408, 1024


def _specs(implementation: str) -> dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]:
    shapes = [jax.ShapeDtypeStruct((B, M, n), jnp.float32) for n in (1, D)]

    def forward(a: jax.Array, x: jax.Array) -> jax.Array:
        return chunk_smooth(a, x, implementation=implementation)

    def both(a: jax.Array, x: jax.Array, g: jax.Array) -> tuple:
        y, back = jax.vjp(forward, a, x)
        return y, back(g)

    return {"f32": (forward, shapes), "f32_grad": (both, [*shapes, shapes[1]])}


def tpu() -> dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]:
    """{name: (function, shapes)} of the kernel."""
    return _specs("tpu")


def cuda() -> dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
