"""Shapes at which `mlstm_chunk` is compiled: the local layers of Bolmo 1B (16 heads, keys of 64, values of 128) and
7B (128 and 256), 8192 bytes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm_chunk.api import mlstm_chunk

B, H, T = 4, 16, 8192

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def _specs(implementation: str) -> Specs:
    def forward(q, k, v, gate, forget, documents, *state):
        return mlstm_chunk(q, k, v, gate, forget, documents, state, implementation=implementation)

    def both(q, k, v, gate, forget, documents, c, n, m, g_h, *g_state):
        def run(*floats):
            return forward(*floats[:5], documents, *floats[5:])

        y, back = jax.vjp(run, q, k, v, gate, forget, c, n, m)
        return y, back((g_h, g_state))

    specs = {}
    for name, k, v, dtype in (
        ("f32_1b", 64, 128, jnp.float32), ("bf16_1b", 64, 128, jnp.bfloat16), ("f32_7b", 128, 256, jnp.float32),
    ):  # fmt: skip
        keys, values = (jax.ShapeDtypeStruct((B, H, T, n), dtype) for n in (k, v))
        gates, documents = jax.ShapeDtypeStruct((B, H, T), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
        state = [jax.ShapeDtypeStruct((B, H, *shape), jnp.float32) for shape in ((k, v), (k,), ())]
        shapes = [keys, keys, values, gates, gates, documents, *state]
        out = jax.ShapeDtypeStruct((B, H, T, v), jnp.float32)
        specs[name] = (forward, shapes)
        # The reference's gradient is in float32 for all.
        if name == "f32_1b" or implementation == "tpu":
            specs[f"{name}_grad"] = (both, [*shapes, out, *state])
    return specs


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel."""
    return _specs("tpu")


def cuda() -> Specs:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
