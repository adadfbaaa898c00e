"""What a model with learned units remembers while it generates: caches sized by chunks, and open units."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.chunking.config import slots_for
from atom_jax.kvcache import dense
from atom_jax.kvcache.dense import Cache
from atom_jax.kvcache.memory import is_layer
from atom_jax.models import stack
from atom_jax.models.hnet import port
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.embedding import SMALL_VOCAB
from atom_jax.params import Tree
from atom_jax.units import Latest, Parts


def init_cache(cfg: HNetConfig, batch_size: int, capacity: int, dtype: Any = None, s: int = 0) -> Cache:
    """An empty memory of stage s and those inside it, with room for `capacity` positions per row, and for the chunks
    to expect of them."""
    dtype, b, d = dtype or jnp.dtype(cfg.dtype), batch_size, cfg.d_model[s]
    stacks = tuple(stack.init_states(layout, cfg.width(s), b, capacity, dtype) for layout in cfg.layouts(s))
    length, parts = jnp.zeros(b, jnp.int32), Parts()
    if s < cfg.stages - 1:
        chunking, own = cfg.chunking[s], jnp.dtype(cfg.dtype)
        inside = init_cache(cfg, b, dense.bucket(slots_for(capacity, chunking.capacity) + 1), dtype, s + 1)
        latest = None if s else Latest.none(chunking, d, b, own)
        parts = Parts.empty(chunking, d, b, own, inside=inside, latest=latest)
    if s == 0:
        parts = parts.replace(port=port.empty(cfg, b))
    return Cache(stacks, length, parts=parts, fresh=True)


def _nodes(cache: Cache | None) -> list[Cache]:
    return [] if cache is None else [cache, *_nodes(cache.parts.inside)]


def full(cache: Cache) -> jax.Array:
    """bool [b]: rows whose next byte might not fit one of the caches."""
    out = jnp.zeros(cache.length.shape, bool)
    for node in _nodes(cache):
        for layer in _attention(node):
            out |= layer.full(node.length)
    return out


def grow(cache: Cache, more: int = 1) -> Cache:
    """The same memory, larger where it is full."""
    if cache.parts.inside is not None:
        cache = cache.replace(parts=cache.parts.replace(inside=grow(cache.parts.inside, more)))
    if any(bool(jnp.any(layer.full(cache.length))) for layer in _attention(cache)):
        layers = jax.tree.map(lambda x: x.grow(more) if is_layer(x) else x, cache.layers, is_leaf=is_layer)
        cache = cache.replace(layers=layers)
    return cache


def _attention(node: Cache) -> list[Any]:
    """The memories of a stage's attention layers."""
    return [x for x in jax.tree.leaves(node.layers, is_leaf=is_layer) if is_layer(x)]


def unstack(cache: Cache) -> Cache:
    """The same memory with a tuple of layers in place of every stacked run."""
    if cache.parts.inside is not None:
        cache = cache.replace(parts=cache.parts.replace(inside=unstack(cache.parts.inside)))
    return cache.replace(layers=tuple(tuple(map(dense.unstack_layers, run)) for run in cache.layers))


def cache_use(cache: Cache, cfg: HNetConfig) -> tuple[jax.Array, jax.Array]:
    """Entries held and read by the latest position, float32 [b] each, averaged over the attention layers."""
    held, layers = jnp.zeros(cache.length.shape, jnp.float32), 0
    for s, node in enumerate(_nodes(cache)):
        for letter, n in (run for layout in cfg.layouts(s) for run in stack.parse(layout) if run[0] in "tTx"):
            window = cfg.width(s).slides(letter)
            held += n * (node.length if window is None else jnp.minimum(node.length, window)).astype(jnp.float32)
            layers += n
    return held / max(layers, 1), held / max(layers, 1)


def decode_params(p: Tree, cfg: HNetConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: a tuple of layers in place of every stacked run, and a transposed
    copy "unembed" of a small table that is also the head's."""
    if not unroll:
        return p
    out = dict(p)
    if cfg.tie_embeddings and cfg.vocab_size <= SMALL_VOCAB:
        out["unembed"] = p["embed"].T
    for s in range(cfg.stages):
        stage = dict(p[f"stage{s}"])
        for name in ("encoder", "decoder", "main"):
            if name in stage:
                runs = {k: v if k == "norm" else dense.unstack_layers(v) for k, v in stage[name].items()}
                stage[name] = runs
        out[f"stage{s}"] = stage
    return out
