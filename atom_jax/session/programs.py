"""The compiled parts of a session: single tokens to their end, drafts that leave no trace, logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.memory import Memory
from atom_jax.models import registry
from atom_jax.typing import Batch


@functools.partial(jax.jit, static_argnames="cfg")
def logits(params: Any, x: jax.Array, *, cfg: Any) -> jax.Array:
    """Logits float32 [b, v] or [b, n, v] of final states [b, d] or [b, n, d]."""
    out = registry.of(cfg).logits(params, x if x.ndim == 3 else x[:, None], cfg=cfg)
    return out if x.ndim == 3 else out[:, 0]


@jax.jit
def use(memory: Memory) -> tuple[jax.Array, jax.Array]:
    """See `memory.use`."""
    return memory_lib.use(memory)


@jax.jit
def short(memory: Memory, live_b: jax.Array) -> jax.Array:
    """bool []: whether the next token of one of these rows might not fit."""
    return jnp.any(memory_lib.full(memory) & live_b)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="memory")
def step(
    params: Any, memory: Memory, token_b: jax.Array, live_b: jax.Array, x_bd: jax.Array | None, *, cfg: Any
) -> tuple[jax.Array, Memory]:
    """The final states [b, d] of one more token of the rows `live_b`, bool [b] (x_bd in others), and the memory after
    it."""
    return _finish(params, memory, token_b, live_b, x_bd, cfg)


def _finish(
    params: Any, memory: Memory, token_b: jax.Array, live_b: jax.Array, x_bd: jax.Array | None, cfg: Any
) -> tuple[jax.Array, Memory]:
    model = registry.of(cfg)

    def once(loop: tuple[jax.Array, Memory, jax.Array]) -> tuple[jax.Array, Memory, jax.Array]:
        x_bd, memory, left_b = loop
        batch = Batch(token_b[:, None], memory.length[:, None], left_b[:, None].astype(jnp.int32))
        x_b1d, memory, ready_b = model.step(params, batch, cfg=cfg, cache=memory)
        return jnp.where(ready_b[:, None], x_b1d[:, 0], x_bd), memory, left_b & ~ready_b

    if x_bd is None:
        shape = jax.eval_shape(lambda: model.step(
            params, Batch(token_b[:, None], memory.length[:, None], token_b[:, None]), cfg=cfg, cache=memory
        )[0])  # fmt: skip
        x_bd = jnp.zeros((shape.shape[0], shape.shape[2]), shape.dtype)
    # Rows may wait for each other; every call reads some of them to the end.
    return jax.lax.while_loop(lambda loop: jnp.any(loop[2]), once, (x_bd, memory, live_b))[:2]


@functools.partial(jax.jit, static_argnames="cfg")
def attempt(params: Any, memory: Memory, ids_bn: jax.Array, count_b: jax.Array, *, cfg: Any) -> tuple[jax.Array, Any]:
    """The final states [b, n, d] of the next `count_b`, i32 [b], tokens of every row, and what `commit` takes."""
    model = registry.of(cfg)
    if not together(memory, cfg=cfg):
        return _in_turn(params, memory, ids_bn, count_b, cfg)[0], ()
    batch = _after(memory, ids_bn, count_b)
    if model.commit is None:
        return model.hidden(params, batch, cfg=model.together(cfg), cache=memory)[0], ()
    return model.hidden(params, batch, cfg=cfg, cache=memory, tentative=True)[:2]


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="memory")
def commit(params: Any, memory: Memory, pending: Any, ids_bn: jax.Array, count_b: jax.Array, *, cfg: Any) -> Memory:
    """The memory after the first `count_b`, i32 [b], of the tokens that were tried."""
    model = registry.of(cfg)
    if not together(memory, cfg=cfg):
        return _in_turn(params, memory, ids_bn, count_b, cfg)[1]
    if model.commit is None:
        batch = _after(memory, ids_bn, count_b)
        return model.hidden(params, batch, cfg=model.together(cfg), cache=memory)[1]
    return model.commit(memory, pending, count_b)


def together(memory: Memory, *, cfg: Any) -> bool:
    """Whether drafts are read in one call, for them to gain by it, with this memory; else token after token."""
    model, policies = registry.of(cfg), list(memory_lib.policies(memory))
    if model.commit is None:
        return model.together(cfg) is not None and not policies
    return not any(policy.agrees for policy in policies)


def _after(memory: Memory, ids_bn: jax.Array, count_b: jax.Array) -> Batch:
    """The next `count_b` tokens of every row."""
    offsets = jnp.broadcast_to(jnp.arange(ids_bn.shape[1], dtype=jnp.int32)[None], ids_bn.shape)
    return Batch(ids_bn, memory.length[:, None] + offsets, (offsets < count_b[:, None]).astype(jnp.int32))


def _in_turn(
    params: Any, memory: Memory, ids_bn: jax.Array, count_b: jax.Array, cfg: Any
) -> tuple[jax.Array, Memory]:
    """States [b, n, d] and the memory after tokens that are read one after another, where they can't be read
    together."""

    def one(memory: Memory, i: jax.Array) -> tuple[Memory, jax.Array]:
        x_bd, memory = _finish(params, memory, ids_bn[:, i], i < count_b, None, cfg)
        return memory, x_bd

    memory, x_nbd = jax.lax.scan(one, memory, jnp.arange(ids_bn.shape[1]))
    return x_nbd.swapaxes(0, 1), memory
