"""Shapes at which `ssd_chunk` is compiled: H-Net's layers of width 1024 (32 heads) and 1536 (48), 8192 positions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.ssd_chunk.api import ssd_chunk

B, T, K, N = 4, 8192, 64, 128

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def _specs(implementation: str) -> Specs:
    def forward(x_bte, dt, decay, b, c, documents, s) -> tuple[jax.Array, jax.Array]:
        # As in a layer, where heads are a view of the channels.
        x = x_bte.reshape(*dt.shape, K)
        y, s = ssd_chunk(x, dt, decay, b, c, documents, s, implementation=implementation)
        return y.reshape(x_bte.shape), s

    def both(x, dt, decay, b, c, documents, s, g_y, g_s) -> tuple:
        y, back = jax.vjp(
            lambda x, dt, decay, b, c, s: forward(x, dt, decay, b, c, documents, s), x, dt, decay, b, c, s
        )
        return y, back((g_y, g_s))

    specs = {}
    for name, h, dtype in (("bf16_32", 32, jnp.bfloat16), ("bf16_48", 48, jnp.bfloat16), ("f32_32", 32, jnp.float32)):
        x, y = (jax.ShapeDtypeStruct((B, T, h * K), d) for d in (dtype, jnp.float32))
        per_head = jax.ShapeDtypeStruct((B, T, h), jnp.float32)
        bc = jax.ShapeDtypeStruct((B, T, N), dtype)
        documents, s = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, h, K, N), jnp.float32)
        shapes = [x, per_head, per_head, bc, bc, documents, s]
        specs[name] = (forward, shapes)
        if h == 32:
            specs[f"{name}_grad"] = (both, [*shapes, y, s])
    return specs


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel."""
    return _specs("tpu")


def cuda() -> Specs:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
