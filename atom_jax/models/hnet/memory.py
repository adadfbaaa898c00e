"""What a model with learned units remembers while it generates: caches sized by chunks, and open units."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from atom_jax.chunking.config import slots_for
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory
from atom_jax.models import stack
from atom_jax.models.family import Node
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.embedding import SMALL_VOCAB
from atom_jax.params import Tree
from atom_jax.units import Latest, Parts


def init_cache(cfg: HNetConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory with room for `capacity` bytes per row, and for the chunks to expect of them: a node of every
    stage, each inside the one outside it."""
    return _node(cfg, 0, batch_size, capacity, dtype or jnp.dtype(cfg.dtype))


def _node(cfg: HNetConfig, s: int, b: int, capacity: int, dtype: Any) -> Memory:
    parts = Parts()
    if s < cfg.stages - 1:
        chunking, d, own = cfg.chunking[s], cfg.d_model[s], jnp.dtype(cfg.dtype)
        inside = _node(cfg, s + 1, b, bucket(slots_for(capacity, chunking.capacity) + 1), dtype)
        latest = None if s else Latest.none(chunking, d, b, own)
        parts = Parts.empty(chunking, d, b, own, inside=inside, latest=latest)
    if s == 0:
        parts = parts.replace(port=ports.of(cfg).empty(cfg, b))
    states = stack.init_states(cfg.stacks(s), cfg.width(s), b, capacity, dtype)
    return Memory(states, jnp.zeros(b, jnp.int32), parts, fresh=True)


def nodes(cfg: HNetConfig) -> tuple[Node, ...]:
    """See `Family`."""
    found = []
    for s in range(cfg.stages):
        stacks = tuple(run.kinds for runs in cfg.stacks(s) for run in runs)
        found.append(Node(stacks, cfg.max_length, cfg.chunking[s].rule if s < cfg.stages - 1 else None))
    return tuple(found)


def decode_params(p: Tree, cfg: HNetConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: separate layers, and a transposed copy "unembed" of a small table
    that is also the head's."""
    out = dict(p)
    if unroll and cfg.tie_embeddings and cfg.vocab_size <= SMALL_VOCAB:
        out["unembed"] = p["embed"].T
    for s in range(cfg.stages):
        names = ("main",) if s == cfg.stages - 1 else ("encoder", "decoder")
        stage = p[f"stage{s}"]
        laid_out = {name: stack.laid_out(stage[name], runs, unroll) for name, runs in zip(names, cfg.stacks(s))}
        out[f"stage{s}"] = stage | laid_out
    return out
