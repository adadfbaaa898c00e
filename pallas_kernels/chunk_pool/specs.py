"""Shapes at which `chunk_pool` is compiled: 8192 bytes of width 1024 in at most 1408 chunks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_pool.api import chunk_pool

B, T, M, D = 8, 8192, 1408, 1024

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def _specs(implementation: str) -> Specs:
    ids, inside = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.bool_))
    specs = {}
    for short, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
        x = jax.ShapeDtypeStruct((B, T, D), dtype)
        for how in ("mean", "max", "last"):

            def forward(x: jax.Array, ids: jax.Array, inside: jax.Array, how: str = how) -> jax.Array:
                return chunk_pool(x, ids, M, how, inside, implementation=implementation)[0]

            def both(x, ids, inside, g, forward=forward) -> tuple:
                u, back = jax.vjp(lambda x: forward(x, ids, inside), x)
                return u, back(g)

            g = jax.ShapeDtypeStruct((B, M, D), jnp.float32 if how == "mean" else dtype)
            specs[f"{how}_{short}"] = (forward, [x, ids, inside])
            if how != "last":
                specs[f"{how}_{short}_grad"] = (both, [x, ids, inside, g])
    return specs


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel."""
    return _specs("tpu")


def cuda() -> Specs:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
