"""What a model makes of a continuation after it has read a context into its cache: the test of a cache policy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import branch
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory
from atom_jax.models import layers, transformer
from atom_jax.nn import scoring
from atom_jax.session.prompts import check_ids
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError

# Continuations of shared contexts that are read at once.
ROWS = 8


class Scores(NamedTuple):
    """Of b rows with s tokens to score each, and c contexts.

    logprobs: f32 [b, s], nats; 0 beyond the end of a continuation. hits: bool [b, s], whether the token was the
    likeliest; False there. held: i32 [l, c, h], entries stored after the context. nbytes: size of the cache's buffers
    then, for all contexts. held_after: i32 [l, b, h], entries after the continuation, whose last token isn't read.
    """

    logprobs: np.ndarray
    hits: np.ndarray
    held: np.ndarray
    nbytes: int
    held_after: np.ndarray


def score(
    lm: LM, contexts: Any, continuations: Any, lengths: Any = None, sizes: Any = None, of: Any = None
) -> Scores:
    """Reads contexts through the model's cache, then their continuations, and scores the latter.

    Both are read as the policy `lm.config.memory` has it: a whole context in one call, or in parts (`reading.plan`).
    The last token of a context predicts the first one of its continuation; the further ones are given (teacher
    forcing) in one call.

    Args:
      contexts: ids [b, t], padded on the right. lengths: their lengths [b], at least 1; None: t.
      continuations: ids [b, s], padded on the right. sizes: their lengths [b], at least 1; None: s.
      of: [b], the row of the context that each of them continues; None: its own. A context is read once. Everything
        kept is shared by its continuations; of what a policy keeps no more than ROWS copies exist at a time.
    Raises AtomError for wrong shapes, ids out of range, and models that are not transformers.
    """
    if not isinstance(lm.config, transformer.TransformerConfig):
        raise AtomError(f"{lm.family}: only transformers have a memory to choose")
    contexts, lengths = _rows("contexts", contexts, lengths, lm.config.vocab_size)
    continuations, sizes = _rows("continuations", continuations, sizes, lm.config.vocab_size)
    if (len(contexts) if of is None else len(of)) != len(continuations):
        raise AtomError(f"there are {len(contexts)} contexts, but {len(continuations)} continuations")
    capacity = bucket(contexts.shape[1])
    session = Session.begin(lm, contexts, lengths, capacity=capacity, params=lm.params, unroll=False)
    held, nbytes = _held(session.memory, cfg=lm.config), session.nbytes
    if of is None:
        x_bsd, held_after = _states(session, continuations, sizes)
    else:
        of, found, order = np.asarray(of), [], []
        for context in dict.fromkeys(of.tolist()):
            mine = np.flatnonzero(of == context)
            for some in np.array_split(mine, range(ROWS, len(mine), ROWS)):
                # As many in every call, for one program.
                rows = np.resize(some, ROWS)
                futures = _futures(session.rows([context]), ROWS, continuations.shape[1])
                x, held_after = _states(futures, continuations[rows], sizes[rows])
                found.append((x[: len(some)], held_after[:, : len(some)]))
                order += some.tolist()
        back = np.argsort(order)
        x_bsd, held_after = (jnp.concatenate(x, axis).take(back, axis) for x, axis in zip(zip(*found), (0, 1)))
    logprobs, hits = _judge(lm.params, x_bsd, continuations, sizes, cfg=lm.config)
    return Scores(*(np.asarray(x) for x in (logprobs, hits, held)), nbytes, np.asarray(held_after))


def _futures(session: Session, n: int, room: int) -> Session:
    """n futures of a session of one row, with room for so many tokens each. Uses it up."""
    memory = session.usable()
    memory = memory if session.lm.config.memory is None else memory_lib.fit(memory, room)
    memory = branch.fork(memory, n, room)
    latest = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (session.token, session.x_bd, session.open_b))
    return Session(session.lm, session.params, memory, *latest)


def _states(session: Session, ids_bs: np.ndarray, sizes_b: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """States [b, s, d] before every token of the continuations, and entries after them, i32 [l, b, h]."""
    states = [session.x_bd[:, None]]
    if ids_bs.shape[1] > 1:
        session, rest = session.read(ids_bs[:, :-1], sizes_b - 1)
        states += rest
    return jnp.concatenate(states, 1)[:, : ids_bs.shape[1]], _held(session.memory, cfg=session.lm.config)


def _rows(what: str, ids: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32 [b, t], 0 where there is padding, and lengths i32 [b]; checked."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) and ids.size):
        raise AtomError(f"{what} must be integers of shape [B, T], got {ids.dtype} of shape {list(ids.shape)}")
    b, t = ids.shape
    lengths = np.full(b, t) if lengths is None else np.asarray(lengths)
    if lengths.shape != (b,) or lengths.min() < 1 or lengths.max() > t:
        raise AtomError(f"{what}: expected {b} lengths between 1 and {t}, got {lengths.tolist()}")
    ids = np.where(np.arange(t)[None] < lengths[:, None], ids, 0)
    check_ids(ids, vocab_size)
    return ids.astype(np.int32), lengths.astype(np.int32)


@functools.partial(jax.jit, static_argnames="cfg")
def _judge(
    params: Any, x_bsd: jax.Array, targets_bs: jax.Array, sizes_b: jax.Array, *, cfg: Any
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32 [b, s] of the targets after these states, and whether each is the likeliest."""
    head = functools.partial(transformer.logits, params, cfg=cfg)
    found = scoring.score(head, x_bsd, targets_bs, ("nats", "hit"))
    real = jnp.arange(x_bsd.shape[1], dtype=jnp.int32)[None] < sizes_b[:, None]
    return jnp.where(real, -found["nats"], 0.0), found["hit"] & real


@functools.partial(jax.jit, static_argnames="cfg")
def _held(cache: Memory, *, cfg: Any) -> jax.Array:
    """Entries stored, i32 [l, b, h]."""
    return layers.ask(cfg.attentions, cache.layers, lambda layer: layer.held(cache.length))
