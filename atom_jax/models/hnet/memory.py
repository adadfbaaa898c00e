"""What a model with learned units remembers while it generates: caches sized by chunks, and open units."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.chunking import pooling, rules
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.types import Boundary, Plan, PlanState
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory
from atom_jax.models import stack
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.embedding import SMALL_VOCAB
from atom_jax.params import Tree


@struct.dataclass
class Units:
    """What a stage keeps besides the memory of its stacks: the states of its rule, plan and pool, the vectors
    [b, k, d] of the newest chunk as they came back, and the memory of the stage inside, whose length counts chunks
    that it has read. The innermost stage has none of these. Of stage 0 also `ids`, the latest of every row, for the
    n-grams, and `waiting`, its rows that wait, see `waiting.step`."""

    rule: Any = ()
    plan: Any = ()
    pool: Any = ()
    newest: Any = ()
    inner: Any = ()
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


def init_cache(cfg: HNetConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory with room for `capacity` bytes per row, and for the chunks to expect of them: a node of every
    stage, each inside the one outside it."""
    return _node(cfg, 0, batch_size, capacity, dtype or jnp.dtype(cfg.dtype))


def _node(cfg: HNetConfig, s: int, b: int, capacity: int, dtype: Any) -> Memory:
    units = Units()
    if s < cfg.stages - 1:
        chunks = bucket(slots_for(capacity, cfg.chunking[s].capacity) + 1)
        units = Units(*begin(cfg, s, b), _node(cfg, s + 1, b, chunks, dtype))
    if s == 0:
        ids = jnp.zeros((b, max(cfg.ngrams, default=1) - 1), jnp.int32)
        units = units.replace(ids=ids, waiting=Waiting.none(cfg, b) if cfg.chunking else ())
    states = stack.init_states(cfg.stacks(s), cfg.width(s), b, capacity, dtype)
    return Memory(states, jnp.zeros(b, jnp.int32), units, fresh=True)


def begin(cfg: HNetConfig, s: int, b: int) -> tuple:
    """States of rule, plan, pool and newest chunk before the first position."""
    chunking, d, dtype = cfg.chunking[s], cfg.d_model[s], jnp.dtype(cfg.dtype)
    return (
        rules.of(chunking.rule).init_state(chunking.rule, d, b),
        PlanState.empty(b),
        pooling.POOLS[chunking.pool].init_state(chunking, d, b, dtype),
        jnp.zeros((b, chunking.slots, d), jnp.float32),
    )


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
