"""What stands before a prompt that leans on a memory: its entries, at new places one after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import DenseLayer, bucket
from atom_jax.kvcache.lasting.chosen import Choice, ChosenLayer, empty
from atom_jax.kvcache.lasting.layer import LateWindow, PartLayer, turned
from atom_jax.kvcache.lasting.paged import FetchedLayer
from atom_jax.kvcache.lasting.score import middle
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import inside as inside_lib
from atom_jax.lasting.blocks import Entries
from atom_jax.lasting.pages import Pages
from atom_jax.lasting.store import Window
from atom_jax.models import registry
from atom_jax.session import laid_out, reading
from atom_jax.typing import LM, Batch

# Room for a prompt that the memory begins with, and its least size.
ROOM, LEAST = 128, 256
# Neighbouring tokens, or units, of a text that are named together.
PAGE = 32


class Front(NamedTuple):
    """k, v: [l, h, n, k], keys before RoPE and values, in the order in which they stand, of the layers that see
    everything. place, source: i32 [n], or [l, h, n] where heads differ, as in `Entries`. sinks: how many of them the
    first ones are; window: how many of the last ones are what was read last. ring_k, ring_v: [s, h, m, k], of all
    that was read last, in the sliding layers. around: the model's memory with all else that is kept of that."""

    k: np.ndarray
    v: np.ndarray
    place: np.ndarray
    source: np.ndarray
    sinks: int
    window: int
    ring_k: np.ndarray
    ring_v: np.ndarray
    around: Memory


def front(lm: LM, entries: list[Entries], kept: dict[str, np.ndarray], window: Window, sinks: int) -> Front:
    """Sinks, entries, then the rest of the window.

    kept: arrays of `Reader.arrays`; empty where there is no window. sinks: of the settings.
    """
    inside = inside_lib.of(lm.config)
    full, sliding, kind = inside.full, inside.sliding, inside.kind
    parts, latest, around = entries, 0, inside.empty()
    ring = (np.zeros((len(sliding), kind.h, 0, kind.k), np.float32),) * 2
    if window.source >= 0:
        skip = min(max(sinks - window.first, 0), window.count)
        first = min(sinks, window.first + window.count)
        ahead = _plain(*(kept[x][full, 0, :, :first] for x in ("sink_k", "sink_v")), 0, window.source)
        cut = slice(skip, window.count)
        rest = _plain(*(kept[x][full, 0, :, cut] for x in "kv"), window.first + skip, window.source)
        ring = tuple(kept[x][sliding, 0, :, : window.count].astype(np.float32) for x in "kv")
        parts, sinks, latest = [ahead, *entries, rest], first, len(rest)
        around = inside.nearer(inside.restored(kept, "the window"))
    else:
        sinks = 0
    wide = max((e.place for e in parts), key=np.ndim).shape[:-1]
    place, source = (
        np.concatenate([np.broadcast_to(getattr(e, name), (*wide, len(e))) for e in parts], axis=-1)
        for name in ("place", "source")
    )
    k, v = (np.concatenate([getattr(e, name).astype(np.float32) for e in parts], axis=2) for name in ("k", "v"))
    return Front(k, v, place, source, sinks, latest, *ring, around)


def _plain(k: np.ndarray, v: np.ndarray, first: int, source: int) -> Entries:
    place = np.arange(first, first + k.shape[2], dtype=np.int32)
    return Entries(k, v, np.zeros(len(place), np.float32), place, np.full_like(place, source))


def dense(lm: LM, front: Front) -> Memory:
    """The model's dense memory that begins with these entries, at places from 0 on."""
    n = front.k.shape[2]
    wide = [(0, 0), (0, 0), (0, bucket(n + ROOM, LEAST) - n), (0, 0)]
    places = jnp.arange(n + wide[2][1], dtype=jnp.int32)
    inside = inside_lib.of(lm.config)
    k, v = _placed(lm, inside.full[0], *(np.pad(x, wide) for x in (front.k, front.v)), places)
    return inside.with_layers(front.around, DenseLayer(k, v), n, _ring(lm, front, n))


def chosen(lm: LM, front: Front, choice: Choice) -> Memory:
    """The model's memory in which pages of these entries are chosen by what is asked; sinks and window are attended
    to in any case, and a prompt begins behind the places that the pages take."""
    old = slice(front.sinks, front.k.shape[2] - front.window)
    count = old.stop - old.start
    size = -(-bucket(count, max(LEAST, choice.pages * choice.page)) // choice.page) * choice.page
    wide = [(0, 0), (0, 0), (0, 0), (0, size - count), (0, 0)]
    # Values in half precision, as they are stored; keys as they are compared, or all are turned for every choice.
    mem = (
        jnp.asarray(np.pad(x[:, None, :, old], wide), dtype)
        for x, dtype in ((front.k, lm.config.dtype), (front.v, jnp.float16))
    )
    return _behind(lm, front, choice, (*mem, count), lambda layers: layers)


def choosing_nothing(memory: Memory) -> Memory:
    """A memory of `chosen` or `paged` whose rows choose no pages."""
    none = lambda x: x.replace(leans=jnp.zeros_like(x.leans)) if isinstance(x, ChosenLayer) else x  # noqa: E731
    return memory_lib.map_layers(none, memory)


def nothing(lm: LM, memory: Memory) -> Memory:
    """One row that has read nothing, to be put among those of `memory`."""
    inside = inside_lib.of(lm.config)
    none = np.zeros((len(inside.full), inside.kind.h, 0, inside.kind.k), np.float32)
    ring = np.zeros((len(inside.sliding), *none.shape[1:]), np.float32)
    around = memory_lib.each(lambda node: node.replace(fresh=False), inside.empty())
    empty_ = Front(none, none, np.zeros(0, np.int32), np.zeros(0, np.int32), 0, 0, ring, ring, around)
    layers = inside.layers_of(memory, inside.full)
    if not isinstance(layers, ChosenLayer):
        return dense(lm, empty_)
    zero = {name: jnp.zeros_like(getattr(layers, name)) for name in ("first", "start", "leans")}
    layers = layers.replace(near_pos=jnp.full_like(layers.near_pos, -1), **zero)
    return inside.with_layers(around, layers, 0, _ring(lm, empty_, 0))


def paged(lm: LM, front: Front, pages: Pages, choice: Choice) -> Memory:
    """As `chosen`, among pages that stay on disk. front: sinks and window alone."""
    count = len(pages.sizes)
    room = bucket(count, max(LEAST, choice.pages)) - count
    marks = jnp.asarray(np.pad(pages.marks()[:, None], [(0, 0), (0, 0), (0, 0), (0, room), (0, 0)]))
    sizes = jnp.asarray(np.pad(pages.sizes, (0, room)))

    def layers(plain: ChosenLayer) -> FetchedLayer:
        own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        of = jnp.arange(len(marks), dtype=jnp.int32)[:, None]
        each = jnp.broadcast_to(sizes[None, None], (len(marks), 1, len(sizes)))
        return FetchedLayer(**own, sizes=each, number=jnp.full_like(of, pages.number), rank=of)

    return _behind(lm, front, choice, (marks, marks[:, :, :, :0], pages.entries), layers)


def _behind(lm: LM, front: Front, choice: Choice, mem: tuple, layers: Callable[[ChosenLayer], ChosenLayer]) -> Memory:
    """The model's memory with what is near and, of the rest, `mem` as of `chosen.empty`; `layers` completes it."""
    n, inside = front.k.shape[2], inside_lib.of(lm.config)
    start = front.sinks + choice.pages * choice.page
    end = start + front.window
    places = np.append(np.arange(front.sinks), np.arange(start, end))
    room, old = bucket(len(places)) - len(places), slice(front.sinks, n - front.window)
    around = (np.pad(np.delete(x, old, axis=2), [(0, 0), (0, 0), (0, room), (0, 0)]) for x in (front.k, front.v))
    pos = jnp.asarray(np.pad(places, (0, room), constant_values=-1), jnp.int32)
    k, v = _placed(lm, inside.full[0], *around, jnp.maximum(pos, 0))
    plain = empty(mem, (k, v, pos), front.sinks, end, inside.kind.n // inside.kind.h, ROOM, choice)
    return inside.with_layers(front.around, layers(plain), end, _ring(lm, front, end))


def looked_at(lm: LM, front: Front, rows: Sequence[np.ndarray], k: int) -> list[list[tuple[int, int, int, float]]]:
    """Of every prompt, i32 [t], the `pages` that it attends to most, sinks apart."""
    source, place = (x[..., front.sinks :] for x in (front.source, front.place))
    return [pages(received(lm, front, row)[..., front.sinks :], source, place, k) for row in rows]


def received(lm: LM, front: Front, ids: np.ndarray) -> np.ndarray:
    """f32 [l, h, n]: attention that the entries receive from the tokens of a prompt, i32 [t], which reads them."""
    n, t, inside = front.k.shape[2], len(ids), inside_lib.of(lm.config)
    # Room for the units that a text begins with, too.
    size, dtype = bucket(max(n, t + 8), LEAST), jnp.dtype(lm.config.dtype)
    wide = [(0, 0), (0, 0), (size - n, 0), (0, 0)]
    layers, h, _, k = front.k.shape
    nothing = jax.tree.map(lambda x: jnp.stack([x] * layers), PartLayer.empty(1, h, 0, size, k, dtype))
    known = {x: jnp.asarray(np.pad(getattr(front, x), wide), dtype)[:, None] for x in ("k", "v")}
    filled = nothing.replace(count=jnp.full_like(nothing.count, size), **known)
    state = inside.with_layers(front.around, filled, n, _ring(lm, front, n))
    padded = np.zeros((1, bucket(t)), np.int32)
    padded[0, :t] = ids
    run = lambda cfg: _look(laid_out.scanned(lm), padded, t, state, cfg=cfg)  # noqa: E731
    return np.asarray(reading.exactly(run, lm.config))[:, 0, :, size - n :]


def pages(
    received_lhn: np.ndarray, source: np.ndarray, place: np.ndarray, k: int
) -> list[tuple[int, int, int, float]]:  # fmt: skip
    """The k pages of text (source, first token, last token) that receive most in the middle layers, each with its
    share of what all of them receive. source, place: as in `Front`."""
    weights = received_lhn[middle(len(received_lhn))]
    where = [
        np.broadcast_to(x, received_lhn.shape)[middle(len(received_lhn))].ravel() for x in (source, place // PAGE)
    ]
    known, index = np.unique(np.stack(where), axis=1, return_inverse=True)
    total = np.bincount(index.ravel(), weights.ravel().astype(np.float64), known.shape[1])
    best = np.argsort(-total, kind="stable")[:k]
    share = total / max(total.sum(), 1e-30)
    return [(int(known[0, i]), int(known[1, i]) * PAGE, (int(known[1, i]) + 1) * PAGE - 1, float(share[i]))
            for i in best]  # fmt: skip


def _ring(lm: LM, front: Front, end: int) -> LateWindow | None:
    """What the sliding layers have in front of a token at `end`; None without such layers."""
    s, h, m, size = front.ring_k.shape
    if not s:
        return None
    inside = inside_lib.of(lm.config)
    number = inside.sliding[0]
    window = inside.kinds[number].window
    places = np.arange(max(end - m, end - window), end)
    slots = min(bucket(end + ROOM, LEAST), window)
    first = jnp.full((s, 1), end - m, jnp.int32)
    newest = (x[:, :, m - len(places) :] for x in (front.ring_k, front.ring_v))
    k, v = _placed(lm, number, *newest, jnp.asarray(places, jnp.int32))
    empty = jnp.zeros((s, 1, h, slots, size), k.dtype)
    return LateWindow(*(empty.at[:, :, :, places % slots].set(x) for x in (k, v)), window, first)


def _placed(
    lm: LM, number: int, k_lhsk: np.ndarray, v_lhsk: np.ndarray, places_s: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys at these places as layer `number` turns them, and values, [l, 1, h, s, k]."""
    kind = inside_lib.of(lm.config).kinds[number]
    return _turn(k_lhsk, v_lhsk, places_s, rotary=kind.rotary, of=kind.rope, dtype=lm.config.dtype)


@functools.partial(jax.jit, static_argnames=("rotary", "of", "dtype"))
def _turn(
    k_lhsk: jax.Array, v_lhsk: jax.Array, places_s: jax.Array, *, rotary: int, of: tuple, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Keys at these places, and values, [l, 1, h, s, k]."""
    k = turned(k_lhsk, places_s[None], rotary, of)
    return k[:, None].astype(dtype), v_lhsk[:, None].astype(dtype)


@functools.partial(jax.jit, static_argnames="cfg")
def _look(params: Any, ids_1t: jax.Array, count: jax.Array, memory: Memory, *, cfg: Any) -> tuple[jax.Array, Any]:
    """f32 [l, 1, h, n], what the entries receive of `count` tokens; and how many units were lost."""
    offsets = jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    batch = Batch(ids_1t, memory.length[:, None] + offsets, (offsets < count).astype(jnp.int32))
    _, memory, aux = registry.of(cfg).hidden(params, batch, cfg=cfg, cache=memory)
    inside = inside_lib.of(cfg)
    return inside.layers_of(memory, inside.full).total, aux.get("lost")
