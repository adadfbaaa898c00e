"""What a model with learned units remembers while it generates: caches sized by chunks, and open units."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.chunking import pooling, rules
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.types import Boundary, Plan, PlanState
from atom_jax.kvcache import dense
from atom_jax.kvcache.dense import Cache
from atom_jax.kvcache.memory import is_layer
from atom_jax.models import stack
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.embedding import SMALL_VOCAB
from atom_jax.params import Tree


@struct.dataclass
class StageState:
    """Memory of one stage: its stacks (one, or encoder and decoder), its rule, its plan, its pool, and the vectors
    [b, k, d] of the newest chunk as they came back. The innermost stage has stacks only. `ids` are the latest ids of
    every row, for the n-grams of stage 0; `waiting`: its rows that wait, see `waiting.step`."""

    stacks: tuple
    rule: Any = ()
    plan: Any = ()
    pool: Any = ()
    newest: Any = ()
    ids: Any = ()
    waiting: Any = ()


@struct.dataclass
class Waiting:
    """Rows whose latest byte begins or ends a unit, for which nothing inside has run yet. What is kept of the byte is
    meaningless in other rows.

    on: bool [b], rows that wait. h: [b, 1, d] encoder states. u: [b, 1, k, d] the units' vectors. boundary, plan: of
    this one position.
    """

    on: jax.Array
    h: jax.Array
    u: jax.Array
    boundary: Boundary
    plan: Plan

    @classmethod
    def none(cls, cfg: HNetConfig, b: int) -> Waiting:
        """No row of b waits."""
        chunking, d, dtype = cfg.chunking[0], cfg.d_model[0], jnp.dtype(cfg.dtype)
        rule, no = rules.of(chunking.rule), jnp.zeros((b, 1), bool)
        p = jnp.zeros((b, 1), jnp.float32) if getattr(rule, "HAS_P", False) else None
        h, u = jnp.zeros((b, 1, d), dtype), jnp.zeros((b, 1, chunking.slots, d), dtype)
        return cls(no[:, 0], h, u, Boundary(no, p, loss=None, kind=rule.KIND), Plan.empty(b, 1, 1))

    def join(self, new: Waiting) -> Waiting:
        """These rows where they wait, and `new` elsewhere."""

        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(self.on.reshape(-1, *[1] * (old.ndim - 1)), old, new)

        return jax.tree.map(pick, self, new)


def init_cache(cfg: HNetConfig, batch_size: int, capacity: int, dtype: Any = None) -> Cache:
    """An empty memory with room for `capacity` bytes per row, and for the chunks to expect of them."""
    dtype, states, b = dtype or jnp.dtype(cfg.dtype), [], batch_size
    for s in range(cfg.stages):
        stacks = tuple(stack.init_states(layout, cfg.width(s), b, capacity, dtype) for layout in cfg.layouts(s))
        states.append(StageState(stacks) if s == cfg.stages - 1 else StageState(stacks, *begin(cfg, s, b)))
        if s < cfg.stages - 1:
            capacity = dense.bucket(slots_for(capacity, cfg.chunking[s].capacity) + 1)
    ids = jnp.zeros((b, max(cfg.ngrams, default=1) - 1), jnp.int32)
    states[0] = states[0].replace(ids=ids, waiting=Waiting.none(cfg, b) if cfg.chunking else ())
    return Cache(layers=tuple(states), length=jnp.zeros(b, jnp.int32), fresh=True)


def begin(cfg: HNetConfig, s: int, b: int) -> tuple:
    """States of rule, plan, pool and newest chunk before the first position."""
    chunking, d, dtype = cfg.chunking[s], cfg.d_model[s], jnp.dtype(cfg.dtype)
    return (
        rules.of(chunking.rule).init_state(chunking.rule, d, b),
        PlanState.empty(b),
        pooling.POOLS[chunking.pool].init_state(chunking, d, b, dtype),
        jnp.zeros((b, chunking.slots, d), jnp.float32),
    )


def full(cache: Cache) -> jax.Array:
    """bool [b]: rows whose next byte might not fit one of the caches."""
    out = jnp.zeros(cache.length.shape, bool)
    length = cache.length
    for state in cache.layers:
        for layer in _attention(state):
            out |= layer.full(length)
        length = state.plan.chunks if isinstance(state.plan, PlanState) else length
    return out


def grow(cache: Cache) -> Cache:
    """The same memory, larger where it is full."""
    layers, length = [], cache.length
    for state in cache.layers:
        if any(bool(jnp.any(layer.full(length))) for layer in _attention(state)):
            stacks = jax.tree.map(lambda x: x.grow(1) if is_layer(x) else x, state.stacks, is_leaf=is_layer)
            state = state.replace(stacks=stacks)
        layers.append(state)
        length = state.plan.chunks if isinstance(state.plan, PlanState) else length
    return cache.replace(layers=tuple(layers))


def _attention(state: StageState) -> list[Any]:
    """The memories of a stage's attention layers."""
    return [x for x in jax.tree.leaves(state.stacks, is_leaf=is_layer) if is_layer(x)]


def unstack(cache: Cache) -> Cache:
    """The same memory with a tuple of layers in place of every stacked run."""
    runs = lambda s: tuple(tuple(map(dense.unstack_layers, one)) for one in s.stacks)  # noqa: E731
    return cache.replace(layers=tuple(s.replace(stacks=runs(s)) for s in cache.layers))


def cache_use(cache: Cache, cfg: HNetConfig) -> tuple[jax.Array, jax.Array]:
    """Entries held and read by the latest position, float32 [b] each, averaged over the attention layers."""
    held, layers, length = jnp.zeros(cache.length.shape, jnp.float32), 0, cache.length
    for s, state in enumerate(cache.layers):
        for letter, n in (run for layout in cfg.layouts(s) for run in stack.parse(layout) if run[0] in "tTx"):
            window = cfg.width(s).slides(letter)
            held += n * (length if window is None else jnp.minimum(length, window)).astype(jnp.float32)
            layers += n
        length = state.plan.chunks if isinstance(state.plan, PlanState) else length
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
