"""Reading prompts, and what follows later, into a model's memory, in as many calls as the memory asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.models import registry
from atom_jax.typing import Batch

# Most tokens of one call for models whose memory is compacted between the parts of a prompt.
PART = 1024


def read(
    params: Any, ids_bt: Any, lengths_b: Any, cache: Any = None, *, cfg: Any
) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Reads tokens after those that the memory has seen: in one call where `read_whole` of the model says so, else in
    parts of at most PART tokens, before each of which the memory is made to fit.

    ids_bt: i32, padded on the right. lengths_b: i32, tokens of every row (0: none). cache: None for an empty memory;
    an older one is given up.
    Returns the states [b, d] of every row's last token (arbitrary in rows without one), the memory, and the states of
    all tokens, [b, n, d] part by part.
    """
    model = registry.of(cfg)
    b, t = ids_bt.shape
    size = t if model.read_whole(cfg) else min(t, PART)
    ids_bt, lengths_b = jnp.pad(jnp.asarray(ids_bt), ((0, 0), (0, -t % size))), jnp.asarray(lengths_b)
    last_bd, states = None, []
    for at in range(0, ids_bt.shape[1], size):
        cache = model.init_cache(cfg, b, size) if cache is None else model.grow(cache, size)
        # A dense or budgeted memory changes its size on the way, so its buffers can't be used again.
        call = _part if model.read_whole(cfg) else part_in_place
        last_bd, x_btd, cache = call(params, ids_bt[:, at : at + size], lengths_b - at, last_bd, cache, cfg=cfg)
        states.append(x_btd)
    return last_bd, cache, states


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
) -> tuple[jax.Array, jax.Array, Any]:
    """Reads the next t tokens of every row, of those that have `left_b` left: the states [b, d] of the last tokens of
    rows that end here (`last_bd` in the others), all states, and the memory."""
    offsets = jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None]
    real = (offsets < left_b[:, None]).astype(jnp.int32)
    batch = Batch(ids_bt, cache.length[:, None] + offsets, real)
    x_btd, cache, _ = registry.of(cfg).hidden(params, batch, cfg=cfg, cache=cache)
    at = jnp.clip(left_b - 1, 0, ids_bt.shape[1] - 1)
    here_bd = jnp.take_along_axis(x_btd, at[:, None, None], axis=1)[:, 0]
    return here_bd if last_bd is None else jnp.where((left_b > 0)[:, None], here_bd, last_bd), x_btd, cache


_part = jax.jit(_read_part, static_argnames="cfg")
part_in_place = jax.jit(_read_part, static_argnames="cfg", donate_argnames="cache")
