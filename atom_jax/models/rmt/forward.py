"""The forward pass of a recurrent memory transformer (Bulatov et al., 2022): whole rows, and rows that go on.

A segment of L tokens is one sequence of the transformer, [memory, tokens, memory], in places 0 to m + L + m. The copy
in front, causal as all is, sees nothing of the segment; the one behind sees all of it, and its final states are the
memory of the next segment. It is read when a full segment is followed by another one, and never before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.kvcache.segment import SegmentLayer
from atom_jax.models import layers, transformer
from atom_jax.models.attention import Attention
from atom_jax.models.rmt.config import RMTConfig
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree
from atom_jax.sharding import constrain
from atom_jax.typing import Batch, Output


def apply(p: Tree, batch: Batch, *, cfg: RMTConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """Logits float32 [b, t, v] of every position, with `aux` as of `hidden`, and the cache."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def logits(p: Tree, x_btd: jax.Array, *, cfg: RMTConfig) -> jax.Array:
    """Logits float32 [b, t, v] of final states."""
    return transformer.logits(p["main"], x_btd, cfg=cfg.blocks)


def hidden(
    p: Tree, batch: Batch, *, cfg: RMTConfig, cache: Memory | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:
    """Final normalised states [b, t, d] in the compute dtype, the cache after these tokens, and, without a cache,
    `lost`: i32 [], tokens for which there was no room (`RMTConfig.documents`), whose states are 0.

    Documents that share a row have a memory each, which begins anew, and none sees another. With a cache every row
    goes on in its own place of its segment, as `batch.segments` says with how many tokens; gradients go back through
    all segments of a call. key: of no use here.
    """
    x = constrain(lookup(p["main"]["embed"], batch.ids, cfg.dtype), "batch", "stored_length", None)
    if cache is None:
        x_btd, lost, real = _whole(p, x, batch, cfg)
        return x_btd, None, {"lost": lost, "metrics": {"lost_tokens": jnp.stack([lost, real]).astype(jnp.float32)}}
    return *_further(p, x, batch, cfg, cache), {}


def step(p: Tree, batch: Batch, *, cfg: RMTConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next token of every row (segment 0: of none): its states [b, 1, d], the cache after it, and the rows
    that have been read to the end, bool [b]."""
    x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
    return x_b1d, cache, batch.segments[:, 0] > 0


def init_cache(cfg: RMTConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory, of one size for texts of any length: keys and values of the present segment, and the memory
    [b, m, d] that it began with. `Memory.length` counts tokens, without memory."""
    main, dtype = cfg.blocks, dtype or jnp.dtype(cfg.dtype)

    def empty(kind: Attention, numbers: tuple[int, ...]) -> Stack:
        one = SegmentLayer.empty(batch_size, kind.h, kind.k, dtype, cfg.memory_tokens, cfg.segment)
        return Stack(stack_layers(one, len(numbers)))

    state = layers.states(main.attentions, empty)
    memory = jnp.zeros((batch_size, cfg.memory_tokens, main.d_model), jnp.dtype(cfg.dtype))
    return Memory((state, memory), jnp.zeros(batch_size, jnp.int32), fresh=True)


def decode_params(p: Tree, cfg: RMTConfig, unroll: bool) -> Tree:
    """Parameters laid out for generation; unroll: separate layers."""
    return {**p, "main": transformer.decode_params(p["main"], cfg.blocks, unroll)}


class Cut(NamedTuple):
    """Where n segments of rows lie. source: i32 [b, n, w], the position of every token; begins: bool [b, n], first
    ones of a document; used: bool [b, n], segments that are there; at: i32 [b, t], the place n * w of every token in
    `source`; real, kept: bool [b, t], tokens, and those that have a segment."""

    source: jax.Array
    begins: jax.Array
    used: jax.Array
    at: jax.Array
    real: jax.Array
    kept: jax.Array


def cut(segments_bt: jax.Array, segment: int, documents: int) -> Cut:
    """Cuts documents (equal numbers, one after another; 0: padding, anywhere) into segments of so many tokens, the
    last of each being shorter. There is room for those of so many documents of any lengths."""
    b, t = segments_bt.shape
    w, documents = min(segment, t), min(documents, t)
    n = (t - documents) // segment + documents
    real = segments_bt > 0
    # Tokens without the padding between them.
    order = jnp.argsort(~real, axis=1, stable=True)
    number = jnp.take_along_axis(segments_bt, order, axis=1)
    places = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    new = jnp.concatenate([jnp.ones((b, 1), bool), number[:, 1:] != number[:, :-1]], axis=1)
    rank = places - jax.lax.cummax(jnp.where(new, places, 0), axis=1)
    first = (rank % segment == 0) & (number > 0)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=n, fill_value=t)[0])(first)
    used, starts = starts < t, jnp.minimum(starts, t - 1)
    source = jnp.minimum(starts[:, :, None] + jnp.arange(w)[None, None], t - 1)
    source = jnp.take_along_axis(order, source.reshape(b, n * w), axis=1).reshape(b, n, w)
    which = jnp.cumsum(first, axis=1) - 1
    back = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    which, rank = (jnp.take_along_axis(x, back, axis=1) for x in (which, rank))
    begins = jnp.take_along_axis(new, starts, axis=1)
    at = jnp.clip(which * w + rank % segment, 0, n * w - 1)
    return Cut(source, begins, used, at, real, real & (which < n))


def _whole(p: Tree, x_btd: jax.Array, batch: Batch, cfg: RMTConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States of rows from their beginning, one segment after another; tokens without room, and tokens."""
    (b, t, d), m, main = x_btd.shape, cfg.memory_tokens, cfg.blocks
    found = cut(batch.segments, cfg.segment, cfg.documents)
    n, w = found.used.shape[1], found.source.shape[2]
    # Nothing follows on a segment where every row holds one at most.
    writes = m if t > cfg.segment else 0
    size = m + w + writes
    tokens = Tokens(*(jnp.broadcast_to(a[None], (b, size)) for a in (jnp.arange(size), jnp.ones(size, jnp.int32))))
    first = _first(p, b, cfg)

    def read(memory_bmd: jax.Array, here: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_bwd, begins_b = here
        memory_bmd = jnp.where(begins_b[:, None, None], first, memory_bmd)
        whole = jnp.concatenate([memory_bmd, x_bwd, memory_bmd[:, :writes]], axis=1)
        y, _, _ = transformer.blocks(p["main"]["layers"], whole, tokens, cfg=main)
        y = rms_norm(y, p["main"]["norm"], main.norm_eps)
        return y[:, m + w :] if writes else memory_bmd, y[:, m : m + w]

    def one(memory_bmd: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        source_bw = found.source[:, i]
        here = jnp.take_along_axis(x_btd, source_bw[:, :, None], axis=1), found.begins[:, i]
        rest = lambda memory_bmd, here: (memory_bmd, jnp.zeros_like(here[0]))  # noqa: E731
        return jax.lax.cond(jnp.any(found.used[:, i]), read, rest, memory_bmd, here)

    one = jax.checkpoint(one) if cfg.remat else one
    _, y_nbwd = jax.lax.scan(one, first, jnp.arange(n))
    y_btd = jnp.take_along_axis(jnp.moveaxis(y_nbwd, 0, 1).reshape(b, n * w, d), found.at[:, :, None], axis=1)
    y_btd = jnp.where((found.kept | ~found.real)[:, :, None], y_btd, 0)
    lost = jnp.sum(found.real & ~found.kept, dtype=jnp.int32)
    return constrain(y_btd, "batch", "length", None), lost, jnp.sum(found.real, dtype=jnp.int32)


def _first(p: Tree, b: int, cfg: RMTConfig) -> jax.Array:
    """The memory [b, m, d] before the first segment."""
    memory = p["memory"] if cfg.memory_tokens else jnp.zeros((0, cfg.main.d_model))
    return jnp.broadcast_to(memory.astype(cfg.dtype)[None], (b, *memory.shape))


def _further(p: Tree, x_btd: jax.Array, batch: Batch, cfg: RMTConfig, cache: Memory) -> tuple[jax.Array, Memory]:
    """States of the next tokens of rows, and the cache after them: every step reads what is left of a row's segment,
    or all of the next one, and begins that first where a row needs it."""
    (b, t, d), m, size = x_btd.shape, cfg.memory_tokens, cfg.segment
    w, before = min(size, t), cache.length % size
    n = -(-((0 if cache.fresh else size - 1) + t) // size)
    total = jnp.sum(batch.segments > 0, axis=1, dtype=jnp.int32)

    def some(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        none = lambda carry: (carry, jnp.zeros((b, w, d), x_btd.dtype))  # noqa: E731
        return jax.lax.cond(jnp.any(carry[2] < total), one, none, carry)

    def one(carry: tuple) -> tuple[tuple, jax.Array]:
        state, memory_bmd, read_b = carry
        length_b = cache.length + read_b
        place_b = length_b % size
        count_b = jnp.minimum(size - place_b, total - read_b)
        turns_b = (place_b == 0) & (count_b > 0)
        if m:
            turn = lambda *now: _turn(p, *now, cfg)  # noqa: E731
            rest = lambda state, memory_bmd, *_: (state, memory_bmd)  # noqa: E731
            state, memory_bmd = jax.lax.cond(jnp.any(turns_b), turn, rest, state, memory_bmd, turns_b, length_b == 0)
        source = jnp.minimum(read_b[:, None] + jnp.arange(w)[None], t - 1)
        here = jnp.take_along_axis(x_btd, source[:, :, None], axis=1)
        y_bwd, state = _places(p, here, m + place_b, count_b, state, cfg)
        return (state, memory_bmd, read_b + count_b), y_bwd

    carry = *cache.layers, jnp.zeros_like(total)
    if n == 1:
        carry, y_btd = one(carry)
    else:
        carry, y_nbwd = jax.lax.scan(some, carry, None, length=n)
        # Where a row's tokens went: the first step took what was left of its segment.
        along = before[:, None] + jnp.arange(t)[None]
        number = along // size
        at = number * w + along - jnp.maximum(number * size, before[:, None])
        y_btd = jnp.take_along_axis(jnp.moveaxis(y_nbwd, 0, 1).reshape(b, n * w, d), at[:, :, None], axis=1)
    state, memory_bmd, read_b = carry
    return y_btd, cache.replace(layers=(state, memory_bmd), length=cache.length + read_b, fresh=False)


def _turn(
    p: Tree, state: Any, memory_bmd: jax.Array, turns_b: jax.Array, new_b: jax.Array, cfg: RMTConfig
) -> tuple[Any, jax.Array]:
    """The state and the memory of rows `turns_b`, bool [b], at the beginning of a segment: the full one before it is
    written (not of rows `new_b`, which have none), and the memory read. Others stay as they are."""
    b, m = turns_b.shape[0], cfg.memory_tokens
    ends_b = turns_b & ~new_b
    write = jnp.full(b, m + cfg.segment, jnp.int32)
    written_bmd, state = _places(p, memory_bmd, write, jnp.where(ends_b, m, 0), state, cfg)
    memory_bmd = jnp.where(ends_b[:, None, None], written_bmd, memory_bmd)
    memory_bmd = jnp.where((turns_b & new_b)[:, None, None], _first(p, b, cfg), memory_bmd)
    _, state = _places(p, memory_bmd, jnp.zeros_like(write), jnp.where(turns_b, m, 0), state, cfg)
    return state, memory_bmd


def _places(
    p: Tree, x_btd: jax.Array, place_b: jax.Array, count_b: jax.Array, state: Any, cfg: RMTConfig
) -> tuple[jax.Array, Any]:
    """Final states [b, t, d] of inputs from these places of rows' segments on, of which the first count_b, i32 [b],
    count, and what is stored then."""
    offsets = jnp.arange(x_btd.shape[1], dtype=jnp.int32)[None]
    tokens = Tokens(place_b[:, None] + offsets, (offsets < count_b[:, None]).astype(jnp.int32))
    y, after, _ = transformer.blocks(
        p["main"]["layers"], x_btd, tokens, cfg=cfg.blocks, cache=Memory(state, place_b.astype(jnp.int32))
    )
    return rms_norm(y, p["main"]["norm"], cfg.main.norm_eps), after.layers
