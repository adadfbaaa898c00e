"""What a Bolmo remembers while it generates: recurrent states of the byte layers and the memory of the others."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from atom_jax import params
from atom_jax.chunking.config import slots_for
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.models import layers, transformer
from atom_jax.models.bolmo.config import BolmoConfig
from atom_jax.models.family import Node
from atom_jax.nn.mlstm import MLSTMState
from atom_jax.params import Tree
from atom_jax.units import Latest, Parts


def init_cache(cfg: BolmoConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory with room for the patches to expect in `capacity` bytes per row; its layers are those of the
    encoder and of the decoder."""
    b, d, dtype = batch_size, cfg.main.d_model, dtype or jnp.dtype(cfg.dtype)
    one = MLSTMState.empty(b, d, cfg.local_heads)
    empty = lambda kind, numbers: Stack(stack_layers(one, len(numbers)))  # noqa: E731
    local = tuple(layers.states(kinds, empty) for kinds in cfg.local)
    inside = transformer.init_cache(cfg.blocks, b, bucket(slots_for(capacity, cfg.capacity) + 1), dtype)
    (chunking,), own, no = cfg.chunking, jnp.dtype(cfg.dtype), jnp.zeros(b, jnp.int32)
    latest = Latest.none(chunking, d, b, own)
    return Memory(local, no, Parts.empty(chunking, d, b, own, inside=inside, latest=latest, port=no), fresh=True)


def nodes(cfg: BolmoConfig) -> tuple[Node, Node]:
    """See `Family`."""
    return Node(cfg.local, cfg.max_length, cfg.rule), Node((cfg.blocks.attentions,), cfg.main.max_length)


def decode_params(p: Tree, cfg: BolmoConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: of separate layers (see `transformer`)."""
    main = transformer.decode_params({"layers": p["main"]}, cfg.blocks, unroll)["layers"]
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "subwords", "unembed") if name in p}
    local = {
        name: layers.laid_out(kinds, p[name], _as_it_is, unroll)
        for name, kinds in zip(("encoder", "decoder"), cfg.local)
    }
    return {**p, **tables, **local, "main": main}


def _as_it_is(kind: None, layer: Tree) -> Tree:
    return layer
