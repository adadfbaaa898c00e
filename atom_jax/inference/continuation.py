"""What a model makes of a continuation after it has read a context into its cache: the test of a cache policy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import params as params_lib
from atom_jax.inference.score import BLOCK, check_ids
from atom_jax.kvcache.dense import Cache
from atom_jax.models import transformer
from atom_jax.typing import LM, AtomError, Batch

# Most tokens of one call for models whose memory is compacted between the parts of a prompt.
PART = 1024


class Scores(NamedTuple):
    """Of b rows with s tokens to score each.

    logprobs: f32 [b, s], nats; 0 beyond the end of a continuation. hits: bool [b, s], whether the token was the
    likeliest; False there. held: i32 [l, b, h], entries stored after the context. nbytes: size of the cache's buffers
    then, for all rows. held_after: i32 [l, b, h], entries after the continuation, whose last token isn't read.
    """

    logprobs: np.ndarray
    hits: np.ndarray
    held: np.ndarray
    nbytes: int
    held_after: np.ndarray


def score(lm: LM, contexts: Any, continuations: Any, lengths: Any = None, sizes: Any = None) -> Scores:
    """Reads contexts through the model's cache, then their continuations, and scores the latter.

    Both are read as the policy `lm.config.memory` has it: a whole context in one call where `transformer.read_whole`
    says so, else in parts of at most 1,024 tokens. The last token of a context predicts the first one of its
    continuation; the further ones are given (teacher forcing) in one call.

    Args:
      contexts: ids [b, t], padded on the right. lengths: their lengths [b], at least 1; None: t.
      continuations: ids [b, s], padded on the right. sizes: their lengths [b], at least 1; None: s.
    Raises AtomError for wrong shapes, ids out of range, and models that are not transformers.
    """
    if not isinstance(lm.config, transformer.TransformerConfig):
        raise AtomError(f"{lm.family}: only transformers have a memory to choose")
    contexts, lengths = _rows("contexts", contexts, lengths, lm.config.vocab_size)
    continuations, sizes = _rows("continuations", continuations, sizes, lm.config.vocab_size)
    if len(contexts) != len(continuations):
        raise AtomError(f"there are {len(contexts)} contexts, but {len(continuations)} continuations")
    zero = np.zeros(len(contexts), np.int32)
    x_bd, cache, _ = _read(lm, contexts, lengths, zero, None)
    cache = transformer.grow(cache, 0)
    held, nbytes = _held(cache), params_lib.nbytes(cache.layers)
    states = [x_bd[:, None]]
    if continuations.shape[1] > 1:
        _, cache, rest = _read(lm, continuations[:, :-1], sizes - 1, lengths, cache)
        states += rest
    logprobs, hits = _judge(lm.params, jnp.concatenate(states, 1), continuations, sizes, cfg=lm.config)
    return Scores(*(np.asarray(x) for x in (logprobs, hits, held)), nbytes, np.asarray(_held(cache)))


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


def _read(
    lm: LM, ids_bt: np.ndarray, lengths_b: np.ndarray, start_b: np.ndarray, cache: Cache | None
) -> tuple[jax.Array, Cache, list[jax.Array]]:
    """Reads tokens from position start_b on, in as many calls as the model needs. cache: None for an empty one.

    Returns the states [b, d] of every row's last token, the cache, and the states [b, n, d] of all, call by call.
    """
    b, t = ids_bt.shape
    most = t if transformer.read_whole(lm.config) else min(t, PART)
    if cache is None:
        cache = transformer.init_cache(lm.config, b, most)
    last, states = jnp.zeros((b, lm.config.d_model), jnp.dtype(lm.config.dtype)), []
    for at in range(0, t, most):
        part = ids_bt[:, at : at + most]
        if not cache.fresh:
            cache = transformer.grow(cache, part.shape[1])
        left, first = lengths_b - np.int32(at), start_b + np.int32(at)
        last, x_btd, cache = _call(lm.params, part, left, first, last, cache, cfg=lm.config)
        states.append(x_btd)
    return last, cache, states


@functools.partial(jax.jit, static_argnames="cfg")
def _call(
    params: Any,
    ids_bt: jax.Array,
    left_b: jax.Array,
    first_b: jax.Array,
    last_bd: jax.Array,
    cache: Cache,
    *,
    cfg: Any,
) -> tuple[jax.Array, jax.Array, Cache]:
    """One call: left_b of its tokens are real (more than t: all; below 1: none), the first stands at first_b. Returns
    the states of the last tokens of rows that end here (of others: last_bd), all states, and the cache."""
    b, t = ids_bt.shape
    at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    batch = Batch(ids_bt, first_b[:, None] + at, (at < left_b[:, None]).astype(jnp.int32))
    x_btd, cache, _ = transformer.hidden(params, batch, cfg=cfg, cache=cache)
    ends = (left_b > 0) & (left_b <= t)
    mine_bd = jnp.take_along_axis(x_btd, jnp.clip(left_b - 1, 0, t - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(ends[:, None], mine_bd, last_bd), x_btd, cache


@functools.partial(jax.jit, static_argnames="cfg")
def _judge(
    params: Any, x_bsd: jax.Array, targets_bs: jax.Array, sizes_b: jax.Array, *, cfg: Any
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32 [b, s] of the targets after these states, and whether each is the likeliest."""
    b, s, d = x_bsd.shape
    n = b * s
    block = min(n, max(16, BLOCK // cfg.vocab_size))

    def one(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_nd, target_n = inputs
        logits = transformer.logits(params, x_nd[None], cfg=cfg)[0]
        chosen = jnp.take_along_axis(logits, target_n[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target_n

    x_nd = jnp.pad(x_bsd.reshape(n, d), ((0, -n % block), (0, 0))).reshape(-1, block, d)
    target_n = jnp.pad(targets_bs.reshape(n), (0, -n % block)).reshape(-1, block)
    logprobs, hits = (y.reshape(-1)[:n].reshape(b, s) for y in jax.lax.map(one, (x_nd, target_n)))
    real = jnp.arange(s, dtype=jnp.int32)[None] < sizes_b[:, None]
    return jnp.where(real, logprobs, 0.0), hits & real


@jax.jit
def _held(cache: Cache) -> jax.Array:
    """Entries stored, i32 [l, b, h]."""
    return jax.vmap(lambda layer: layer.held(cache.length))(cache.layers)
