"""Shapes at which `chunk_unpool` is compiled: 8192 bytes that read 1408 chunks of width 1024."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_unpool.api import chunk_unpool

B, T, M, D = 8, 8192, 1408, 1024

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def _specs(implementation: str) -> Specs:
    def forward(x: jax.Array, read: jax.Array, z: jax.Array) -> jax.Array:
        return chunk_unpool(x, read, z, implementation=implementation)

    def both(x: jax.Array, read: jax.Array, z: jax.Array, g: jax.Array) -> tuple:
        y, back = jax.vjp(lambda x, z: forward(x, read, z), x, z)
        return y, back(g)

    specs = {}
    for short, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
        x, z, g = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, M, D), (B, D), (B, T, D)))
        read = jax.ShapeDtypeStruct((B, T), jnp.int32)
        specs |= {short: (forward, [x, read, z]), f"{short}_grad": (both, [x, read, z, g])}
    return specs


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel."""
    return _specs("tpu")


def cuda() -> Specs:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
