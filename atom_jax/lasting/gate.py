"""Texts that lean on a memory, and texts that don't: a mixture of the model with what is remembered and without it.

What is remembered makes other texts harder. So before a prompt all that may stand in front of it is equally likely:
everything remembered, what was read last, each of these with passages that are read again, nothing. The prompt's
tokens after the first make one of these likelier, by Bayes' rule; and all that follows is that one's, drawn once,
which is how a mixture is drawn from. At temperature 1 these tokens and what follows are then together less likely
than without the entries by ln 3 nats at most (ln 5 with passages); at temperature 0 the likeliest one is taken,
which says that of the prompt alone. Where passages are found, or pages chosen, by the prompt itself, that one is
favoured: what it gives to prompts does not add up to 1. States (`knn`) are mixed in whatever stands in front.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.memory import Memory
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session import laid_out, reading
from atom_jax.session.prompts import padded
from atom_jax.typing import LM, Batch

# Prompts that are read in one call.
ROWS = 8


class Fronts(NamedTuple):
    """Memories of one row that may stand in front of a prompt: with all that is remembered; of that with sinks and
    window alone; with nothing."""

    memory: Memory
    near: Memory
    nothing: Memory


class Side(enum.IntEnum):
    """What stands in front of a prompt: of `Fronts` `memory` and passages, `memory`, `near` and passages, `near`,
    `nothing`. Of equally likely ones the first is the likeliest."""

    PASSAGES = 0
    MEMORY = 1
    AGAIN = 2
    NEAR = 3
    NOTHING = 4


# Those with passages.
REREAD = (Side.PASSAGES, Side.AGAIN)


def weigh(
    lm: LM, fronts: Fronts, prompts: Sequence[np.ndarray], alone: Sequence[np.ndarray], passages: Sequence[np.ndarray]
) -> np.ndarray:
    """Nats of prompts, i32 [t] each, but of their first tokens, on every `Side`: f64 [5, n]. alone: how they are read
    with nothing in front, where a text may begin with further tokens; passages: i32 [p] each, what is read again; inf
    for a prompt that has none."""
    count = np.array([len(prompt) for prompt in prompts])
    out = np.full((len(Side), len(prompts)), np.inf)
    out[Side.MEMORY] = _nats(lm, fronts.memory, prompts, count)
    out[Side.NEAR] = _nats(lm, fronts.near, prompts, count)
    out[Side.NOTHING] = _nats(lm, fronts.nothing, alone, count)
    some = np.flatnonzero([len(passage) for passage in passages])
    again = [np.concatenate([passages[i], prompts[i]]) for i in some]
    for side, memory in zip(REREAD, (fronts.memory, fronts.near)):
        out[side, some] = _nats(lm, memory, again, count[some])
    return out


def front(fronts: Fronts, side_b: np.ndarray) -> Memory:
    """A row for each of these `Side`s, i32 [b]."""
    which = np.where(side_b == Side.PASSAGES, Side.MEMORY, np.where(side_b == Side.AGAIN, Side.NEAR, side_b))
    first, *others = np.unique(which)
    of = {Side.MEMORY: fronts.memory, Side.NEAR: fronts.near, Side.NOTHING: fronts.nothing}
    found = memory_lib.rows(of[first], np.zeros(len(which), np.int32))
    for one in others:
        rows = np.flatnonzero(which == one)
        found = memory_lib.put(found, rows, memory_lib.rows(of[one], np.zeros(len(rows), np.int32)))
    return found


def mixed(weight_kb: np.ndarray, nats_kbt: np.ndarray) -> np.ndarray:
    """Nats of tokens under a mixture of k sides, f64 [b, t], each given those before it. weight: f64 [k, b], nats by
    which every side is ahead before the first of them; nats: f64 [k, b, t], of every side."""
    ahead = weight_kb[..., None] - (np.cumsum(nats_kbt, axis=2) - nats_kbt)
    return np.logaddexp.reduce(ahead, axis=0) - np.logaddexp.reduce(ahead - nats_kbt, axis=0)


def _nats(lm: LM, memory: Memory, rows: Sequence[np.ndarray], count: np.ndarray) -> np.ndarray:
    """Of the last `count` tokens of every row, i32 [n], but the first of these, behind one row of memory: f64 [n]."""
    out, longest = [], max((len(row) for row in rows), default=0)
    for at in range(0, len(rows), ROWS):
        some = list(rows[at : at + ROWS])
        # The last of them again, so that all calls have one shape.
        some += some[-1:] * (min(len(rows), ROWS) - len(some))
        ids, lengths = padded(some, longest)
        nats = said(lm, memory_lib.rows(memory, np.zeros(len(some), np.int32)), ids, lengths)[1].astype(np.float64)
        for row, length, n in zip(nats, lengths, count[at : at + ROWS]):
            out.append(row[length - n : length - 1].sum())
    return np.array(out)


def said(lm: LM, memory: Memory, ids_bt: np.ndarray, length_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every token but the first, [b, t - 1], read behind a memory of b rows, which is given up: whether it is the
    likeliest, bool, and its nats, f32."""
    memory = reading.agreed(laid_out.scanned(lm), ids_bt, length_b, memory, cfg=lm.config)
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
