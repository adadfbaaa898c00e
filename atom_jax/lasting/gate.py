"""Which prompts lean on a memory: those that it makes likelier. What is remembered makes other texts harder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import ChosenLayer
from atom_jax.kvcache.memory import Memory
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session import laid_out, reading
from atom_jax.session.prompts import padded
from atom_jax.typing import LM, Batch


def front(lm: LM, memory: Memory, without: Memory, prompts: Sequence[np.ndarray], gain: float) -> Memory:
    """What stands in front of these prompts, i32 [t] each, a row for each: `memory`, one row with entries, where the
    prompt's tokens after the first are together more than `gain` nats likelier behind it than behind `without`, one
    row with sinks and window alone; else that. gain: 0: `memory` for all."""
    every = memory_lib.rows(memory, np.zeros(len(prompts), np.int32))
    if not gain or not len(prompts):
        return every
    ids, lengths = padded(list(prompts), 0)
    real = np.arange(ids.shape[1] - 1)[None] < lengths[:, None] - 1
    behind, alone = (
        np.where(real, said(lm, memory_lib.rows(one, np.zeros(len(ids), np.int32)), ids, lengths)[1], 0).sum(1)
        for one in (memory, without)
    )
    other = np.flatnonzero(alone - behind <= gain)
    if not len(other):
        return every
    return memory_lib.put(every, other, memory_lib.rows(without, np.zeros(len(other), np.int32)))


def leaning_on_nothing(memory: Memory) -> Memory:
    """The memory whose rows choose no pages."""
    nothing = lambda x: x.replace(leans=jnp.zeros_like(x.leans)) if isinstance(x, ChosenLayer) else x  # noqa: E731
    return memory_lib.map_layers(nothing, memory)


def said(lm: LM, memory: Memory, ids_bt: np.ndarray, length_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every token but the first, [b, t - 1], read behind a memory of b rows, which is given up: whether it is the
    likeliest, bool, and its nats, f32."""
    room = lambda cfg: reading.room(memory, ids_bt.shape[1], cfg)  # noqa: E731
    run = lambda cfg: _said(laid_out.scanned(lm), ids_bt, length_b, room(cfg), cfg=cfg)  # noqa: E731
    return jax.device_get(reading.exactly(run, lm.config))


@functools.partial(jax.jit, static_argnames="cfg")
def _said(
    params: Any, ids_bt: jax.Array, length_b: jax.Array, memory: Memory, *, cfg: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """As of `said`; and how many units were lost."""
    model, offsets = registry.of(cfg), jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None]
    codec = model.codec(cfg)
    real = (offsets < length_b[:, None]).astype(jnp.int32)
    batch = Batch(ids_bt, memory.length[:, None] + offsets, real)
    x_btd, _, aux = model.hidden(params, batch, cfg=cfg, cache=memory)
    head = lambda x_btd: codec.merge(model.logits(params, x_btd, cfg=cfg))  # noqa: E731
    # Where the form of tokens is decided late, states are those before the tokens.
    before = x_btd[:, 1:] if codec.pending else x_btd[:, :-1]
    found = scoring.score(head, before, codec.plain(ids_bt[:, 1:]), ("hit", "nats"))
    return (found["hit"], found["nats"]), aux.get("lost")
