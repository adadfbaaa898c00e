"""Batched log-likelihoods of the last tokens of many sequences.

Sequences are sorted by length and padded to few lengths, so that few programs are compiled. Logits are computed at
the scored positions only, in blocks of bounded size. Items with the same input (the letters of a multiple-choice
question) share one row.

A Bolmo's bytes are scored as its authors do, each by the sum of its two forms. Where patches end before a byte was
found with a look at it, which favours such models a little; `inference.score.logprobs` gives the sum without that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.evaluation.encode import Item
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session.reading import exactly
from atom_jax.sharding import batch_sharding
from atom_jax.typing import LM, AtomError, Batch

# Elements of one block of logits: 64 MiB of float32.
BLOCK = 1 << 24


class Score(NamedTuple):
    """Of one item: log-probability in nats of its scored tokens, and whether each of them was the likeliest."""

    logprob: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """One batch: `rows` are inputs padded to `length`; `items` (indices) belong to the rows numbered in `row_of`."""

    length: int
    rows: list[np.ndarray]
    items: list[int]
    row_of: list[int]


def plan(items: Sequence[Item], batch_tokens: int, multiple: int = 1) -> list[Work]:
    """Groups items into batches of about `batch_tokens` tokens, longest first.

    multiple: row counts are multiples of it. The batches depend on these arguments only, so that an interrupted
    evaluation goes on with the same ones. Raises AtomError for an item with nothing to score.
    """
    inputs: dict[bytes, list[int]] = {}
    for i, item in enumerate(items):
        if not 1 <= item.start < len(item.ids):
            raise AtomError(f"item {i}: tokens from {item.start} on of {len(item.ids)} cannot be scored")
        inputs.setdefault(item.ids[:-1].tobytes(), []).append(i)
    groups = sorted(inputs.values(), key=lambda group: (-len(items[group[0]].ids), group[0]))
    work: list[Work] = []
    for group in groups:
        row = items[group[0]].ids[:-1]
        length = bucket(len(row))
        if not work or work[-1].length != length or len(work[-1].rows) >= row_count(length, batch_tokens, multiple):
            work.append(Work(length, [], [], []))
        work[-1].items.extend(group)
        work[-1].row_of.extend([len(work[-1].rows)] * len(group))
        work[-1].rows.append(row)
    return work


def row_count(length: int, batch_tokens: int, multiple: int = 1) -> int:
    """Rows of a batch of sequences padded to `length`."""
    return max(1, batch_tokens // length // multiple) * multiple


def score(
    lm: LM, items: Sequence[Item], work: Sequence[Work], batch_tokens: int, mesh: Any = None
) -> Iterator[tuple[Work, list[Score]]]:
    """Scores batches in order, and yields each with the scores of its `items`.

    mesh: where lm.params are placed, or None for one device. The next batch is started before the scores of the last
    one are awaited. Raises AtomError when a log-likelihood is not finite.
    """
    sharding = None if mesh is None else batch_sharding(mesh)
    multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    pending: list[tuple[Work, Any]] = []
    for one in work:
        pending.append((one, _start(lm, items, one, batch_tokens, multiple, sharding)))
        if len(pending) == 2:
            yield _finish(items, *pending.pop(0))
    for rest in pending:
        yield _finish(items, *rest)


def _start(lm: LM, items: Sequence[Item], one: Work, batch_tokens: int, multiple: int, sharding: Any) -> list[Any]:
    """Starts the computation; returns [log-probabilities, hits] of blocks of scored positions, in order."""
    rows = row_count(one.length, batch_tokens, multiple)
    ids = np.zeros((rows, one.length), np.int32)
    lengths = np.zeros(rows, np.int32)
    for r, row in enumerate(one.rows):
        ids[r, : len(row)], lengths[r] = row, len(row)
    mask = np.arange(one.length)[None] < lengths[:, None]
    suffix = registry.of(lm.config).codec(lm.config).suffix(lm.tokenizer, ids, mask)
    inputs = jax.device_put((ids, lengths, suffix), sharding)
    size = max(rows * one.length, batch_tokens)
    x = exactly(lambda cfg: states(lm.params, *inputs, cfg=cfg, size=size), lm.config)
    index, target = [], []
    for i, r in zip(one.items, one.row_of):
        item = items[i]
        index.append(r * one.length + np.arange(item.start - 1, len(item.ids) - 1))
        target.append(item.ids[item.start :])
    block = max(1, min(x.shape[0], BLOCK // lm.config.vocab_size))
    index, target = (np.concatenate(a).astype(np.int32) for a in (index, target))
    padded = [np.pad(a, (0, -len(a) % block)).reshape(-1, block) for a in (index, target)]
    return [head(lm.params, x, i, t, cfg=lm.config) for i, t in zip(*padded)]


def _finish(items: Sequence[Item], one: Work, blocks: list[Any]) -> tuple[Work, list[Score]]:
    logprob = np.concatenate([np.asarray(b[0], np.float64) for b in blocks])
    hit = np.concatenate([np.asarray(b[1]) for b in blocks])
    ends = np.cumsum([len(items[i].ids) - items[i].start for i in one.items])
    scores = []
    for end, i in zip(ends, one.items):
        span = slice(end - len(items[i].ids) + items[i].start, end)
        scores.append(Score(float(logprob[span].sum()), bool(hit[span].all())))
        if not math.isfinite(scores[-1].logprob):
            raise AtomError(f"the model gives item {i} a log-likelihood of {scores[-1].logprob}")
    return one, scores


@functools.partial(jax.jit, static_argnames=("cfg", "size"))
def states(
    params: Any, ids_bt: jax.Array, lengths_b: jax.Array, suffix: Any, *, cfg: Any, size: int
) -> tuple[jax.Array, Any]:
    """Final states [size, d] of all positions, one row after the other, filled up with zeros: with one size for all
    lengths, `head` is compiled once. And how much was lost, for `exactly`."""
    positions = jnp.broadcast_to(jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None], ids_bt.shape)
    segments = (positions < lengths_b[:, None]).astype(jnp.int32)
    batch = Batch(ids=ids_bt, positions=positions, segments=segments, suffix=suffix)
    x_btd, _, aux = registry.of(cfg).hidden(params, batch, cfg=cfg)
    x = x_btd.reshape(-1, x_btd.shape[-1])
    return jnp.pad(x, ((0, size - x.shape[0]), (0, 0))), aux.get("lost")


@functools.partial(jax.jit, static_argnames=("cfg",))
def head(params: Any, x: jax.Array, index: jax.Array, target: jax.Array, *, cfg: Any) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [n] of each target after the state at its index, and whether it is the likeliest."""
    model = registry.of(cfg)
    codec = model.codec(cfg)
    merged = lambda x_btd: codec.merge(model.logits(params, x_btd, cfg=cfg))  # noqa: E731
    found = scoring.score(merged, x[index][None], codec.plain(target)[None], ("nats", "hit"))
    return -found["nats"][0], found["hit"][0]
