"""What a Bolmo remembers while it generates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.chunking.config import slots_for
from atom_jax.kvcache import dense
from atom_jax.kvcache.dense import Cache
from atom_jax.kvcache.memory import stack_layers
from atom_jax.models import transformer, transformer_memory
from atom_jax.models.bolmo.config import BolmoConfig
from atom_jax.nn.mlstm import MLSTMState
from atom_jax.params import Tree
from atom_jax.units import Latest, Parts


def init_cache(cfg: BolmoConfig, batch_size: int, capacity: int, dtype: Any = None) -> Cache:
    """An empty memory with room for the patches to expect in `capacity` bytes per row."""
    b, d, dtype = batch_size, cfg.main.d_model, dtype or jnp.dtype(cfg.dtype)
    one = MLSTMState.empty(b, d, cfg.local_heads)
    layers = tuple(stack_layers(one, n) for n in (cfg.encoder_layers, cfg.decoder_layers))
    patches = dense.bucket(slots_for(capacity, cfg.capacity) + 1)
    own, no = jnp.dtype(cfg.dtype), jnp.zeros(b, jnp.int32)
    parts = Parts.empty(
        cfg.chunking[0], d, b, own, inside=transformer_memory.init_cache(cfg.blocks, b, patches, dtype),
        latest=Latest.none(cfg.chunking[0], d, b, own), port=no,
    )  # fmt: skip
    return Cache(layers, no, parts=parts, fresh=True)


def full(cache: Cache) -> jax.Array:
    """bool [b]: rows whose next patch might not fit."""
    return transformer_memory.full(cache.parts.inside)


def grow(cache: Cache, more: int = 1) -> Cache:
    """The same memory with room for `more` further patches per row. Runs on the host."""
    return cache.replace(parts=cache.parts.replace(inside=transformer_memory.grow(cache.parts.inside, more)))


def unstack(cache: Cache) -> Cache:
    """The same memory with a tuple of layers in place of every stacked one."""
    inside = transformer_memory.unstack(cache.parts.inside)
    layers = tuple(dense.unstack_layers(run) for run in cache.layers)
    return cache.replace(layers=layers, parts=cache.parts.replace(inside=inside))


def cache_use(cache: Cache, cfg: BolmoConfig) -> tuple[jax.Array, jax.Array]:
    """Entries held and read by the latest patch, float32 [b] each, averaged over layers and key/value heads."""
    return transformer_memory.cache_use(cache.parts.inside, cfg.blocks)


def decode_params(p: Tree, cfg: BolmoConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: a tuple of layers in place of every stack (see `transformer`)."""
    main = transformer.decode_params({"layers": p["main"]}, cfg.blocks, unroll)["layers"]
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "subwords", "unembed") if name in p}
    local = {name: dense.unstack_layers(p[name]) for name in ("encoder", "decoder")} if unroll else {}
    return {**p, **tables, **local, "main": main}
