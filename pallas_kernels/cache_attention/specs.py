"""Shapes at which `cache_attention` is compiled: a decode step of an 8B model (8 key/value heads of four query heads,
size 128) for 16 sequences, over pages of 32 and of 128 entries; and JAX's own kernel at the same, for comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from pallas_kernels.cache_attention.api import cache_attention
from pallas_kernels.cache_attention.kernel import ENTRIES

B, H, G, K, CAPACITY = 16, 8, 4, 128, 4096

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def _shapes(page: int, dtype: jnp.dtype, heads: int = H, size: int = K) -> list[jax.ShapeDtypeStruct]:
    n = CAPACITY // page
    rows = jax.ShapeDtypeStruct((B, heads), jnp.int32)
    pool = jax.ShapeDtypeStruct((B * heads * n, page, size), dtype)
    q = jax.ShapeDtypeStruct((B, heads, G, size), jnp.bfloat16 if dtype == jnp.int8 else dtype)
    scales = [jax.ShapeDtypeStruct((B * heads * n, 1, page), jnp.float32)] * 2 if dtype == jnp.int8 else []
    return [q, pool, pool, rows, jax.ShapeDtypeStruct((B, heads, n), jnp.int32), *scales]


def _int8(q, k, v, lengths, pages, k_scale, v_scale, *, implementation):
    return cache_attention(
        q, k, v, lengths, pages, k_scale_p1c=k_scale, v_scale_p1c=v_scale, implementation=implementation
    )


def _specs(implementation: str) -> Specs:
    plain, int8 = (functools.partial(f, implementation=implementation) for f in (cache_attention, _int8))
    specs: Specs = {f"bf16_page{page}": (plain, _shapes(page, jnp.bfloat16)) for page in (32, 128)}
    specs["bf16_page32_k64"] = (plain, _shapes(32, jnp.bfloat16, 3, 64))
    specs["f32_page32"] = (plain, _shapes(32, jnp.float32))
    return specs | {f"int8_page{page}": (int8, _shapes(page, jnp.int8)) for page in (32, 128)}


def _jax(page: int) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """JAX's `paged_attention`, whose pages hold no more than one head either, with as many entries per step."""
    n = CAPACITY // page
    pool = jax.ShapeDtypeStruct((H, B * n, page, K), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((B, H * G, K), jnp.bfloat16)
    lengths, table = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B,), (B, n)))
    return functools.partial(paged_attention, pages_per_compute_block=ENTRIES // page), [
        q,
        pool,
        pool,
        lengths,
        table,
    ]


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel, and of JAX's."""
    return _specs("tpu") | {f"jax_bf16_page{page}": _jax(page) for page in (32, 128)}


def cuda() -> Specs:
    """The same of what runs on an H100: the reference."""
    return _specs("reference")
