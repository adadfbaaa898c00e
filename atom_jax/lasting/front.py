"""What stands before a prompt that leans on a memory: its entries, at new places one after another."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dense import DenseLayer, bucket
from atom_jax.kvcache.lasting.chosen import Choice, empty
from atom_jax.kvcache.lasting.layer import PartLayer, turned
from atom_jax.kvcache.lasting.score import middle
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting.blocks import Entries
from atom_jax.lasting.reader import layers_of, with_layers
from atom_jax.lasting.store import Window
from atom_jax.models import registry
from atom_jax.typing import LM, Batch

# Room for a prompt that the memory begins with, and its least size.
ROOM, LEAST = 128, 256
# Neighbouring tokens of a text that are named together.
PAGE = 32


class Front(NamedTuple):
    """k, v: [l, h, n, k], keys before RoPE and values, in the order in which they stand. place, source: i32 [n], or
    [l, h, n] where heads differ, as in `Entries`. sinks: how many of them the first ones are; window: how many of the
    last ones are what was read last."""

    k: np.ndarray
    v: np.ndarray
    place: np.ndarray
    source: np.ndarray
    sinks: int
    window: int


def front(entries: list[Entries], kept: dict[str, np.ndarray], window: Window, sinks: int) -> Front:
    """Sinks, entries, then the rest of the window.

    kept: arrays of `Reader.arrays`; empty where there is no window. sinks: of the settings.
    """
    parts, latest = entries, 0
    if window.source >= 0:
        skip = min(max(sinks - window.first, 0), window.count)
        first = min(sinks, window.first + window.count)
        ahead = _plain(kept["sink_k"][:, 0, :, :first], kept["sink_v"][:, 0, :, :first], 0, window.source)
        cut = slice(skip, window.count)
        rest = _plain(kept["k"][:, 0, :, cut], kept["v"][:, 0, :, cut], window.first + skip, window.source)
        parts, sinks, latest = [ahead, *entries, rest], first, len(rest)
    else:
        sinks = 0
    wide = max((e.place for e in parts), key=np.ndim).shape[:-1]
    place, source = (
        np.concatenate([np.broadcast_to(getattr(e, name), (*wide, len(e))) for e in parts], axis=-1)
        for name in ("place", "source")
    )
    k, v = (np.concatenate([getattr(e, name).astype(np.float32) for e in parts], axis=2) for name in ("k", "v"))
    return Front(k, v, place, source, sinks, latest)


def _plain(k: np.ndarray, v: np.ndarray, first: int, source: int) -> Entries:
    place = np.arange(first, first + k.shape[2], dtype=np.int32)
    return Entries(k, v, np.zeros(len(place), np.float32), place, np.full_like(place, source))


def dense(lm: LM, front: Front) -> Memory:
    """The model's dense memory that begins with these entries, at places from 0 on."""
    n = front.k.shape[2]
    wide = [(0, 0), (0, 0), (0, bucket(n + ROOM, LEAST) - n), (0, 0)]
    kind, dtype = lm.config.attentions[0], lm.config.dtype
    places = jnp.arange(n + wide[2][1], dtype=jnp.int32)
    k, v = (np.pad(x, wide) for x in (front.k, front.v))
    k, v = _placed(k, v, places, rotary=kind.rotary, of=kind.rope, dtype=dtype)
    return with_layers(lm, DenseLayer(k, v), n)


def chosen(lm: LM, front: Front, choice: Choice) -> Memory:
    """The model's memory in which pages of these entries are chosen by what is asked; sinks and window are attended
    to in any case, and a prompt begins behind the places that the pages take."""
    n, kind, dtype = front.k.shape[2], lm.config.attentions[0], lm.config.dtype
    old = slice(front.sinks, n - front.window)
    start = front.sinks + choice.pages * choice.page
    places = np.append(np.arange(front.sinks), np.arange(start, start + front.window))
    room = bucket(len(places)) - len(places)
    around = (np.pad(np.delete(x, old, axis=2), [(0, 0), (0, 0), (0, room), (0, 0)]) for x in (front.k, front.v))
    pos = jnp.asarray(np.pad(places, (0, room), constant_values=-1), jnp.int32)
    k, v = _placed(*around, jnp.maximum(pos, 0), rotary=kind.rotary, of=kind.rope, dtype=dtype)
    count = old.stop - old.start
    size = -(-bucket(count, max(LEAST, choice.pages * choice.page)) // choice.page) * choice.page
    wide = [(0, 0), (0, 0), (0, 0), (0, size - count), (0, 0)]
    # In half precision, as they are stored.
    mem = (jnp.asarray(np.pad(x[:, None, :, old], wide), jnp.float16) for x in (front.k, front.v))
    sizes = (front.sinks, start + front.window, kind.n // kind.h, ROOM)
    return with_layers(lm, empty((*mem, count), (k, v, pos), *sizes, choice), start + front.window)


def received(lm: LM, front: Front, ids: np.ndarray) -> np.ndarray:
    """f32 [l, h, n]: attention that the entries receive from the tokens of a prompt, i32 [t], which reads them."""
    n, t = front.k.shape[2], len(ids)
    size, dtype = bucket(n, LEAST), jnp.dtype(lm.config.dtype)
    wide = [(0, 0), (0, 0), (size - n, 0), (0, 0)]
    layers, h, _, k = front.k.shape
    nothing = PartLayer.empty(layers, h, 0, size, k, dtype)
    filled = nothing.replace(**{x: jnp.asarray(np.pad(getattr(front, x), wide), dtype) for x in ("k", "v")})
    state = with_layers(lm, jax.tree.map(lambda x: x[:, None], filled), n)
    padded = np.zeros((1, bucket(t)), np.int32)
    padded[0, :t] = ids
    return np.asarray(_look(lm.params, padded, t, state, cfg=lm.config))[:, 0, :, size - n :]


def pages(received_lhn: np.ndarray, front: Front, k: int) -> list[tuple[int, int, int, float]]:
    """The k pages of text (source, first token, last token) that receive most in the middle layers, each with its
    share of what all entries but sinks receive."""
    weights = received_lhn[middle(len(received_lhn))][..., front.sinks :]
    where = [
        np.broadcast_to(x, received_lhn.shape)[middle(len(received_lhn))][..., front.sinks :].ravel()
        for x in (front.source, front.place // PAGE)
    ]
    known, index = np.unique(np.stack(where), axis=1, return_inverse=True)
    total = np.bincount(index.ravel(), weights.ravel().astype(np.float64), known.shape[1])
    best = np.argsort(-total, kind="stable")[:k]
    share = total / max(total.sum(), 1e-30)
    return [(int(known[0, i]), int(known[1, i]) * PAGE, (int(known[1, i]) + 1) * PAGE - 1, float(share[i]))
            for i in best]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("rotary", "of", "dtype"))
def _placed(
    k_lhsk: jax.Array, v_lhsk: jax.Array, places_s: jax.Array, *, rotary: int, of: tuple, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Keys at these places, and values, [l, 1, h, s, k]."""
    k = turned(k_lhsk, places_s[None], rotary, of)
    return k[:, None].astype(dtype), v_lhsk[:, None].astype(dtype)


@functools.partial(jax.jit, static_argnames="cfg")
def _look(params: Any, ids_1t: jax.Array, count: jax.Array, memory: Memory, *, cfg: Any) -> jax.Array:
    """f32 [l, 1, h, n], what the entries receive of `count` tokens."""
    offsets = jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    batch = Batch(ids_1t, memory.length[:, None] + offsets, (offsets < count).astype(jnp.int32))
    _, memory, _ = registry.of(cfg).hidden(params, batch, cfg=cfg, cache=memory)
    return layers_of(memory).total
