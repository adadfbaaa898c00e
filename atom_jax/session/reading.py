"""Reading prompts, and what follows later, into a model's memory, in as many calls as the memory asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.chunking.config import per_stage
from atom_jax.kvcache import memory, readings
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.lasting import chosen
from atom_jax.kvcache.memory import Memory
from atom_jax.models import registry
from atom_jax.typing import Batch

# Tokens that a memory which keeps everything reads at once, where somebody waits to hear how far it has come.
PART = 1024


class Plan(NamedTuple):
    """How a model's memory reads.

    part: most tokens of one call, where the memory is compacted between the parts of a prompt; None: any number, as
    in models with units of their own. passes: how often it reads a prompt. shrinks: whether it can be smaller after a
    prompt than while that is read. waits: whether rows may wait with the token that they chose last (`Family.step`),
    which therefore goes through that before a later turn. pieces: a prompt may be cut anywhere, and its parts read
    one after another, which gives the same (but for rounding).
    """

    part: int | None
    passes: int
    shrinks: bool
    waits: bool = False
    pieces: bool = False


def room(cache: Memory | None, positions: int, cfg: Any) -> Memory | None:
    """The memory with room for so many further positions of every row, and for as many units of them as this
    configuration has; None stays None. Runs on the host."""
    chunking = getattr(cfg, "chunking", ())
    more = per_stage(positions, chunking) if chunking else positions
    return None if cache is None else memory.grow(cache, more)


@functools.cache
def plan(cfg: Any) -> Plan:
    """Of the model with this configuration."""
    cache = jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, 1, 1))
    passes, part, policies = memory.passes(cache), memory.part(cache), list(memory.policies(cache))
    waits, shrinks = cache.parts != (), any(policy.shrinks for policy in policies)
    whole = waits or any(policy.part is None for policy in policies)
    return Plan(part if passes == 1 and not waits else None, passes, shrinks, waits, not whole)


def read(
    params: Any,
    ids_bt: Any,
    lengths_b: Any,
    cache: Memory | None = None,
    *,
    cfg: Any,
    size: int = 0,
    on_part: Callable[[int], None] | None = None,
) -> tuple[jax.Array, Memory, list[jax.Array]]:
    """Reads tokens after those that the memory has seen, as `plan` says; the memory is made to fit before each call.

    ids_bt: i32, padded on the right. lengths_b: i32, tokens of every row (0: none). cache: None for an empty memory;
    an older one is given up. size: most tokens of a call, where `plan` does not say it; 0: all. on_part: called with
    the number of tokens read so far after every part.
    Returns the states [b, d] of every row's last token (arbitrary in rows without one), the memory, and the states of
    all tokens, [b, n, d] part by part.
    """
    t, how = ids_bt.shape[1], plan(cfg)
    size = min(t, how.part or size or t)
    ids_bt, lengths_b = jnp.pad(jnp.asarray(ids_bt), ((0, 0), (0, -t % size))), jnp.asarray(lengths_b)
    last_bd, states = None, []
    for at in range(0, ids_bt.shape[1], size):

        def once(cfg: Any, at: int = at, last_bd: Any = last_bd, cache: Memory | None = cache) -> tuple[Any, Any]:
            # Where units are lost, the same memory is read after once more.
            call = _part if how.waits else part_in_place
            return call(params, ids_bt[:, at : at + size], lengths_b - at, last_bd, room(cache, size, cfg), cfg=cfg)

        last_bd, x_btd, cache = exactly(once, cfg)
        states.append(x_btd)
        if on_part is not None:
            jax.block_until_ready(last_bd)
            on_part(min(at + size, t))
    return last_bd, cache, states


def agreed(params: Any, ids_bt: Any, length_b: Any, cache: Memory, *, cfg: Any) -> Memory:
    """The memory in which layers that choose what prompts lean on have agreed (`chosen.wanting`): it has read nothing
    more. ids_bt, length_b: as for `read`. Another one is given back as it is."""
    if not any(np.asarray(x.leans).any() for x in chosen.of(cache)):
        return cache
    run = lambda cfg: _agreed(params, ids_bt, length_b, room(cache, ids_bt.shape[1], cfg), cfg=cfg)  # noqa: E731
    return exactly(run, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _agreed(params: Any, ids_bt: jax.Array, length_b: jax.Array, cache: Memory, *, cfg: Any) -> tuple[Memory, Any]:
    offsets = jnp.broadcast_to(jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None], ids_bt.shape)
    batch = Batch(ids_bt, cache.length[:, None] + offsets, (offsets < length_b[:, None]).astype(jnp.int32))
    _, asked, aux = registry.of(cfg).hidden(params, batch, cfg=cfg, cache=cache)
    return chosen.wanting(cache, asked), aux.get("lost")


def first(
    params: Any,
    ids_bt: Any,
    length_b: Any,
    suffix: Any = None,
    *,
    cfg: Any,
    capacity: int,
    on_part: Callable[[int], None] | None = None,
) -> tuple[jax.Array, Memory]:
    """As `read`, prompts of at least one token each, in an empty memory with room for `capacity` tokens per row.
    suffix: as in Batch. on_part: as for `read`; with it a memory that keeps everything reads a single prompt in
    parts, too."""
    part, longest = plan(cfg).part, int(length_b.max())
    if part is not None:
        parts = -(-longest // part)
        return read(params, ids_bt[:, : parts * part], length_b, cfg=cfg, on_part=on_part)[:2]

    def once(ids_bt: Any, length_b: Any) -> tuple[jax.Array, Memory]:
        return exactly(lambda cfg: read_prompt(params, ids_bt, length_b, suffix, cfg=cfg, capacity=capacity), cfg)

    cuts = registry.of(cfg).memory(cfg) is None and not plan(cfg).waits and len(ids_bt) == 1
    if on_part is None or not cuts or longest <= PART:
        return once(ids_bt, length_b)
    _, cache = once(ids_bt[:, :PART], np.array([PART], np.int32))
    on_part(PART)
    rest = ids_bt[:, PART : -(-longest // PART) * PART]
    later = lambda done: on_part(PART + done)  # noqa: E731
    return read(params, rest, length_b - PART, cache, cfg=cfg, size=PART, on_part=later)[:2]


@functools.partial(jax.jit, static_argnames=("cfg", "capacity"))
def read_prompt(
    params: Any, ids_bt: jax.Array, length_b: jax.Array, suffix: Any = None, *, cfg: Any, capacity: int
) -> tuple[tuple[jax.Array, Memory], Any]:
    """What `first` gives, in one call, and how many units were lost."""
    positions = jnp.broadcast_to(jnp.arange(ids_bt.shape[1])[None], ids_bt.shape)
    batch = Batch(ids_bt, positions, (positions < length_b[:, None]).astype(jnp.int32), suffix=suffix)
    x_btd, cache, aux = prompt(params, batch, cfg=cfg, capacity=capacity)
    last = jnp.maximum(length_b - 1, 0)
    return (jnp.take_along_axis(x_btd, last[:, None, None], axis=1)[:, 0], cache), aux.get("lost")


def prompt(params: Any, batch: Batch, *, cfg: Any, capacity: int) -> tuple[jax.Array, Memory, dict[str, Any]]:
    """The states of prompts [b, t, d], their memory, with room for `capacity` tokens per row, and what was learned;
    they are read as often as the memory asks for, each time after the time before."""
    model, again = registry.of(cfg), plan(cfg).passes - 1
    b, t = batch.ids.shape
    cache = model.init_cache(cfg, b, capacity + again * t)
    x_btd, cache, aux = model.hidden(params, batch, cfg=cfg, cache=cache)
    reread, places = cache, batch.positions
    for _ in range(again):
        later = batch.replace(positions=places + reread.length[:, None])
        _, reread, _ = model.hidden(params, later, cfg=cfg, cache=readings.once_more(reread))
    return x_btd, readings.settle(cache, reread), aux


def exactly(run: Callable[[Any], tuple[Any, Any]], cfg: Any) -> Any:
    """The result of `run(cfg)`, run again with more room until no unit is lost: few sizes, so few compilations.

    run: returns (result, number of units for which there was no room, or None for models that lose none).
    """
    while True:
        result, lost = run(cfg)
        wider = None if lost is None else registry.of(cfg).roomier(cfg)
        if wider is None or int(lost) == 0:
            return result
        cfg = wider


def _read_part(
    params: Any, ids_bt: jax.Array, left_b: jax.Array, last_bd: Any, cache: Any, *, cfg: Any
) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
    """Reads the next t tokens of every row, of those that have `left_b` left: the states [b, d] of the last tokens of
    rows that end here (`last_bd` in the others), all states, and the memory; and what was lost."""
    offsets = jnp.broadcast_to(jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None], ids_bt.shape)
    real = (offsets < left_b[:, None]).astype(jnp.int32)
    if cache is None:
        x_btd, cache, aux = prompt(params, Batch(ids_bt, offsets, real), cfg=cfg, capacity=bucket(ids_bt.shape[1]))
    else:
        batch = Batch(ids_bt, cache.length[:, None] + offsets, real)
        x_btd, cache, aux = registry.of(cfg).hidden(params, batch, cfg=cfg, cache=cache)
    at = jnp.clip(left_b - 1, 0, ids_bt.shape[1] - 1)
    here_bd = jnp.take_along_axis(x_btd, at[:, None, None], axis=1)[:, 0]
    last_bd = here_bd if last_bd is None else jnp.where((left_b > 0)[:, None], here_bd, last_bd)
    return (last_bd, x_btd, cache), aux.get("lost")


_part = jax.jit(_read_part, static_argnames="cfg")
part_in_place = jax.jit(_read_part, static_argnames="cfg", donate_argnames="cache")
