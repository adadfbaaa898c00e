"""A model's logits and log-probabilities for given tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import memory as lasting
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session.prompts import check_ids, check_model
from atom_jax.session.reading import exactly, room
from atom_jax.typing import LM, AtomError, Batch, Output


def apply(lm: LM, ids: Any, mask: Any = None, *, memory: lasting.Memory | None = None) -> Output:
    """Logits float32 [b, t, v] at every position; meaningless where the mask is False.

    Args:
      ids: integers [b, t].
      mask: bool [b, t], True = real; None = all real. Padding may be on the left or on the right of a row.
      memory: what the model has read in earlier sessions, before which no row has padding; None: nothing.
    Raises AtomError for wrong shapes, ids out of range, rows longer than the model's positions, or a row whose real
    positions are not contiguous.
    """
    batch, cache, params = _after(lm, to_batch(lm, ids, mask), memory)
    return exactly(lambda cfg: _apply(params, batch, room(cache, batch.ids.shape[1], cfg), cfg=cfg), lm.config)


def logprobs(
    lm: LM, ids: Any, mask: Any = None, marginal: bool = False, *, memory: lasting.Memory | None = None
) -> jax.Array:
    """Log-probability of each token given those before it, float32 [b, t - 1]: entry i is that of ids[:, i + 1].

    marginal: for ids that also say where patches end (Bolmo). False: of the byte together with what the boundary
    predictor says of it; the sum is one that a decoder could reach. True: of the byte alone, as the official
    evaluation has it; the sum is too high, since patches before the byte were found with a look at it.

    0 where either of the two positions is padding. Arguments and errors as for `apply`; the logits of all positions
    never exist together.
    """
    batch, cache, params = _after(lm, to_batch(lm, ids, mask), memory)
    if batch.ids.shape[1] < 2:
        return jnp.zeros((batch.ids.shape[0], 0), jnp.float32)
    grown = lambda cfg: room(cache, batch.ids.shape[1], cfg)  # noqa: E731
    run = lambda cfg: _logprobs(params, batch, grown(cfg), cfg=cfg, marginal=marginal)  # noqa: E731
    return exactly(run, lm.config)


def _after(lm: LM, batch: Batch, memory: lasting.Memory | None) -> tuple[Batch, Memory | None, Any]:
    """The batch behind what a lasting memory holds, the cache that this makes (None where nothing is to be in front),
    and the model's parameters, with the states that are mixed in."""
    if memory is None or not (memory.length or memory.states):
        return batch, None, lm.params
    family = registry.of(lm.config)
    if (memory.length and family.memory(lm.config) is not None) or not memory.belongs(lm):
        raise AtomError("memory: belongs to another model, or this one has a cache policy; it is for the dense cache")
    params = memory.mixing(lm.params)
    if not memory.length:
        return batch, None, params
    if memory.chooses:
        raise AtomError(f"memory: prompts choose among its {memory.length} entries; whole rows have no logits then")
    if family.codec(lm.config).pending:
        raise AtomError("memory: this model sees a byte ahead where units end; rows have no logits behind a memory")
    b, t = batch.ids.shape
    if not bool(jnp.all(batch.segments[:, 0] > 0)):
        raise AtomError("mask: with a memory, padding may only be on the right of a row")
    if (longest := memory.taken + t) > lm.config.max_length:
        raise AtomError(f"ids: with the memory a row takes {longest} of {lm.config.max_length} positions")
    front = memory.front(b)
    return batch.replace(positions=batch.positions + front.length[:, None]), front, params


def to_batch(lm: LM, ids: Any, mask: Any = None) -> Batch:
    """Checks ids and mask as `apply` describes them; positions count the real tokens of a row from 0."""
    check_model(lm)
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise AtomError("ids must be integers of shape [B, T], got rows of different lengths") from None
    if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) and ids.size):
        raise AtomError(f"ids must be integers of shape [B, T], got {ids.dtype} of shape {list(ids.shape)}")
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if mask.shape != ids.shape:
        raise AtomError(f"mask has shape {list(mask.shape)}, ids have {list(ids.shape)}")
    if (np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1).sum(1).max() > 1:
        raise AtomError("mask: the real positions of a row must be contiguous")
    check_ids(np.where(mask, ids, 0), lm.config.vocab_size)
    if (longest := int(mask.sum(1).max())) > lm.config.max_length:
        raise AtomError(f"ids: a row of {longest} tokens exceeds the {lm.config.max_length} positions of the model")
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    # Ids of padding may be anything, for example -1.
    clean = np.where(mask, ids, 0)
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (clean, positions, mask)))
    return batch.replace(suffix=registry.of(lm.config).codec(lm.config).suffix(lm.tokenizer, clean, mask))


@functools.partial(jax.jit, static_argnames="cfg")
def _apply(params: Any, batch: Batch, cache: Memory | None, *, cfg: Any) -> tuple[Output, Any]:
    out, _ = registry.of(cfg).apply(params, batch, cfg=cfg, cache=cache)
    return out, out.aux.get("lost")


@functools.partial(jax.jit, static_argnames=("cfg", "marginal"))
def _logprobs(params: Any, batch: Batch, cache: Memory | None, *, cfg: Any, marginal: bool) -> tuple[jax.Array, Any]:
    model = registry.of(cfg)
    codec = model.codec(cfg)
    x_btd, _, aux = model.hidden(params, batch, cfg=cfg, cache=cache)
    targets_bt = codec.fuse(jnp.roll(batch.ids, -1, axis=1), aux)
    head = functools.partial(model.logits, params, cfg=cfg)
    if marginal:
        head = lambda x_btd: codec.merge(model.logits(params, x_btd, cfg=cfg))  # noqa: E731
        targets_bt = codec.plain(targets_bt)
    out = -scoring.score(head, x_btd[:, :-1], targets_bt[:, :-1])["nats"]
    both = (batch.segments[:, 1:] > 0) & (batch.segments[:, :-1] > 0)
    return jnp.where(both, out, 0.0), aux.get("lost")
