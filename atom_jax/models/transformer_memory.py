"""The memory of a transformer: the caches of its layers under any policy (`kvcache.memory.Layer`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.kvcache import dense
from atom_jax.kvcache.dense import Cache, DenseLayer
from atom_jax.kvcache.memory import Sizes, is_layer, stack_layers
from atom_jax.kvcache.window import WindowLayer


def init_cache(cfg: Any, batch_size: int, capacity: int, dtype: Any = None) -> Cache:
    """An empty cache of the policy `cfg.memory`, stacked over layers, with room for `capacity` tokens per row."""
    sizes = Sizes(
        cfg.n_layers, batch_size, cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads, cfg.head_dim,
        dtype or jnp.dtype(cfg.dtype), (cfg.rope_theta, cfg.rope_scaling),
    )  # fmt: skip
    if cfg.memory is None:
        shape = (sizes.b, sizes.h, capacity, sizes.k, sizes.dtype)
        # Stacked layers have one shape: a ring of the latest tokens takes that all of them slide.
        slides = set(cfg.layer_types) == {"sliding"}
        layer = WindowLayer.empty(*shape, cfg.sliding_window) if slides else DenseLayer.empty(*shape)
        layers = stack_layers(layer, sizes.layers)
    else:
        layers = cfg.memory.init(sizes, capacity)
    return Cache(layers=layers, length=jnp.zeros(batch_size, jnp.int32), fresh=True)


def full(cache: Cache) -> jax.Array:
    """bool [b]: rows whose next token might not fit."""
    rows = [_over_layers(x, lambda one: one.full(cache.length)) for x in _layers(cache)]
    return functools.reduce(jnp.logical_or, [jnp.any(x, axis=0) for x in rows])


def grow(cache: Cache, more: int = 1) -> Cache:
    """The same memory with room for `more` further tokens per row. Runs on the host."""
    return cache.replace(layers=jax.tree.map(lambda x: x.grow(more), cache.layers, is_leaf=is_layer))


def _layers(cache: Cache) -> list[Any]:
    """Layers, or one stack of them."""
    return jax.tree.leaves(cache.layers, is_leaf=is_layer)


def _over_layers(x: Any, fn: Any) -> jax.Array:
    """fn of every layer, with a leading layer axis, for a layer alone or stacked."""
    return jax.vmap(fn)(x) if x.k.ndim > x.RANK else fn(x)[None]


def unstack(cache: Cache) -> Cache:
    """The same memory with a tuple of layers in place of a stacked one."""
    return cache.replace(layers=dense.unstack_layers(cache.layers))


def read_whole(cfg: Any) -> bool:
    """Whether prompts are read in one call, however long; else in parts, between which the memory is compacted."""
    return cfg.dms is None


def cache_use(cache: Cache, cfg: Any) -> tuple[jax.Array, jax.Array]:
    """Entries of the cache that each row holds, and that its latest token read: float32 [b] each, averaged over
    layers and key/value heads."""
    held, read = (
        jnp.concatenate([_over_layers(x, lambda one, f=f: getattr(one, f)(cache.length)) for x in _layers(cache)])
        .astype(jnp.float32)
        .mean((0, 2))
        for f in ("held", "read")
    )
    sliding = sum(kind == "sliding" for kind in cfg.layer_types) / cfg.n_layers
    return held, (1 - sliding) * read + sliding * jnp.minimum(read, cfg.sliding_window)
