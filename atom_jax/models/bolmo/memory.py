"""What a Bolmo remembers while it generates: recurrent states of the byte layers and the memory of the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import params
from atom_jax.chunking.config import slots_for
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory, Stack, stack_layers
from atom_jax.models import layers, transformer
from atom_jax.models.bolmo.config import BolmoConfig
from atom_jax.nn.mlstm import MLSTMState
from atom_jax.params import Tree


@struct.dataclass
class Patches:
    """What is kept of b rows besides the states of encoder and decoder.

    main: memory of the layers over patches, whose length counts patches. newest: [b, 1, d] the latest patch as the
    decoder reads it. h: [b, 1, d] the encoder state of the latest byte, and read: bool [b], rows in which only the
    encoder has seen that byte. suffix: i32 [b], states of the automaton that finds subwords.
    """

    main: Memory
    newest: jax.Array
    h: jax.Array
    read: jax.Array
    suffix: jax.Array


def init_cache(cfg: BolmoConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory with room for the patches to expect in `capacity` bytes per row; its layers are those of the
    encoder and of the decoder."""
    b, d, dtype = batch_size, cfg.main.d_model, dtype or jnp.dtype(cfg.dtype)
    one = MLSTMState.empty(b, d, cfg.local_heads)
    empty = lambda kind, numbers: Stack(stack_layers(one, len(numbers)))  # noqa: E731
    local = tuple(layers.states(kinds, empty) for kinds in cfg.local)
    main = transformer.init_cache(cfg.blocks, b, bucket(slots_for(capacity, cfg.capacity) + 1), dtype)
    nothing, no = jnp.zeros((b, 1, d), jnp.dtype(cfg.dtype)), jnp.zeros(b, jnp.int32)
    return Memory(local, no, Patches(main, nothing, nothing, no > 0, no), fresh=True)


def decode_params(p: Tree, cfg: BolmoConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: of separate layers (see `transformer`)."""
    main = transformer.decode_params({"layers": p["main"]}, cfg.blocks, unroll)["layers"]
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "subwords", "unembed") if name in p}
    local = {
        name: layers.laid_out(kinds, p[name], _as_it_is, unroll)
        for name, kinds in zip(("encoder", "decoder"), cfg.local)
    }
    return {**p, **tables, **local, "main": main}


def _as_it_is(kind: None, layer: Tree, side_by_side: bool) -> Tree:
    return layer
