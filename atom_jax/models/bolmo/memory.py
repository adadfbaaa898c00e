"""What a Bolmo remembers while it generates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import params
from atom_jax.chunking.config import slots_for
from atom_jax.kvcache import dense
from atom_jax.kvcache.dense import Cache
from atom_jax.kvcache.memory import stack_layers
from atom_jax.models import transformer, transformer_memory
from atom_jax.models.bolmo.config import BolmoConfig
from atom_jax.nn.mlstm import MLSTMState
from atom_jax.params import Tree


@struct.dataclass
class BolmoState:
    """Memory of b rows.

    encoder, decoder: MLSTMState of their layers. main: Cache of the layers over patches, whose length counts patches.
    newest: [b, 1, d] the latest patch as the decoder reads it. h: [b, 1, d] the encoder state of the latest byte, and
    read: bool [b], rows in which only the encoder has seen that byte. suffix: i32 [b], states of the automaton that
    finds subwords.
    """

    encoder: Any
    decoder: Any
    main: Cache
    newest: jax.Array
    h: jax.Array
    read: jax.Array
    suffix: jax.Array


def init_cache(cfg: BolmoConfig, batch_size: int, capacity: int, dtype: Any = None) -> Cache:
    """An empty memory with room for the patches to expect in `capacity` bytes per row."""
    b, d, dtype = batch_size, cfg.main.d_model, dtype or jnp.dtype(cfg.dtype)
    one = MLSTMState.empty(b, d, cfg.local_heads)
    encoder, decoder = (stack_layers(one, n) for n in (cfg.encoder_layers, cfg.decoder_layers))
    patches = dense.bucket(slots_for(capacity, cfg.capacity) + 1)
    main = transformer_memory.init_cache(cfg.blocks, b, patches, dtype)
    nothing, no = jnp.zeros((b, 1, d), jnp.dtype(cfg.dtype)), jnp.zeros(b, jnp.int32)
    return Cache(BolmoState(encoder, decoder, main, nothing, nothing, no > 0, no), no, fresh=True)


def full(cache: Cache) -> jax.Array:
    """bool [b]: rows whose next patch might not fit."""
    return transformer_memory.full(cache.layers.main)


def grow(cache: Cache, more: int = 1) -> Cache:
    """The same memory with room for `more` further patches per row. Runs on the host."""
    return cache.replace(layers=cache.layers.replace(main=transformer_memory.grow(cache.layers.main, more)))


def unstack(cache: Cache) -> Cache:
    """The same memory with a tuple of layers in place of every stacked one."""
    state = cache.layers
    encoder, decoder = (dense.unstack_layers(s) for s in (state.encoder, state.decoder))
    main = transformer_memory.unstack(state.main)
    return cache.replace(layers=state.replace(encoder=encoder, decoder=decoder, main=main))


def cache_use(cache: Cache, cfg: BolmoConfig) -> tuple[jax.Array, jax.Array]:
    """Entries held and read by the latest patch, float32 [b] each, averaged over layers and key/value heads."""
    return transformer_memory.cache_use(cache.layers.main, cfg.blocks)


def decode_params(p: Tree, cfg: BolmoConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: a tuple of layers in place of every stack (see `transformer`)."""
    main = transformer.decode_params({"layers": p["main"]}, cfg.blocks, unroll)["layers"]
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "subwords", "unembed") if name in p}
    local = {name: dense.unstack_layers(p[name]) for name in ("encoder", "decoder")} if unroll else {}
    return {**p, **tables, **local, "main": main}
