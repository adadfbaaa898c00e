"""The compiled halves of generation: reading prompts, and choosing tokens one after another."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.inference import sampling
from atom_jax.inference.score import exactly
from atom_jax.models import registry
from atom_jax.typing import LM, Batch

# Tokens that one call of `decode` can make for each row.
CHUNK = 128


@struct.dataclass
class State:
    """Where generation stands.

    cache: the model's memory. token: i32 [b], chosen, but not yet read by the model. done: bool [b]. made: i32,
    tokens chosen so far in every row that is not done.
    """

    cache: Any
    token: jax.Array
    done: jax.Array
    made: jax.Array


@struct.dataclass
class Choice:
    """How next tokens are chosen. keys [b]: one PRNG key per row; stop_ids: i32 [n], where -1 matches none."""

    keys: jax.Array
    how: sampling.Sampler
    stop_ids: jax.Array

    def take(self, logits_bv: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens i32 [b] and whether each is a stop id, bool [b]."""
        token = sampling.choose(logits_bv, self.keys, step, self.how)
        return token, jnp.any(token[:, None] == self.stop_ids[None], axis=1)


@struct.dataclass
class Made:
    """What one call made.

    tokens: i32 [b, CHUNK], -1 where there is none. reads: f32 [b], cache entries that each row read; peak: f32, the
    most entries that unfinished rows held together; both averaged over layers and heads.
    """

    tokens: jax.Array
    reads: jax.Array
    peak: jax.Array


_LAID_OUT: dict[int, tuple[list[Any], Any]] = {}


def decode_params(lm: LM) -> Any:
    """The model's `decode_params` for this backend, kept as long as `lm` lives and its arrays are the same."""
    leaves = jax.tree.leaves(lm.params)
    known, laid_out = _LAID_OUT.get(id(lm), ([], None))
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves)):
        laid_out = registry.of(lm.config).decode_params(lm.params, lm.config, unroll=unrolls(lm))
        if id(lm) not in _LAID_OUT:
            weakref.finalize(lm, _LAID_OUT.pop, id(lm), None).atexit = False
        _LAID_OUT[id(lm)] = leaves, laid_out
    return laid_out


def unrolls(lm: LM) -> bool:
    """Whether generation runs separate layers instead of stacked ones: on one CPU device."""
    leaves = jax.tree.leaves(lm.params)
    spread = any(len(x.sharding.device_set) > 1 for x in leaves if isinstance(x, jax.Array))
    return jax.default_backend() == "cpu" and not spread


def start(
    params: Any, ids_bt: Any, length_b: Any, choice: Choice, *, cfg: Any, capacity: int, unroll: bool
) -> tuple[State, jax.Array]:
    """Reads prompts and chooses the first new token of every row.

    ids_bt: i32, prompts padded on the right; length_b: i32, their lengths, at least 1. unroll: one cache per layer
    instead of a stacked one. Returns the state and the tokens i32 [b], -1 where a stop id was chosen.
    """
    read = functools.partial(_read, params, ids_bt, length_b, capacity=capacity)
    logits_bv, cache = exactly(lambda cfg: read(cfg=cfg), cfg)
    token, done, made = _first(choice, logits_bv)
    state = State(registry.of(cfg).unstack(cache) if unroll else cache, token, done, made)
    return state, jnp.where(done, -1, token)


@functools.partial(jax.jit, static_argnames=("cfg", "capacity"))
def _read(params: Any, ids_bt: jax.Array, length_b: jax.Array, *, cfg: Any, capacity: int) -> tuple[Any, Any]:
    """(logits after the last token of every prompt, float32 [b, v], and the cache), and what was lost."""
    model = registry.of(cfg)
    b, t = ids_bt.shape
    positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    batch = Batch(ids_bt, positions, (positions < length_b[:, None]).astype(jnp.int32))
    x_btd, cache, aux = model.hidden(params, batch, cfg=cfg, cache=model.init_cache(cfg, b, capacity))
    last_b1d = jnp.take_along_axis(x_btd, (length_b - 1)[:, None, None], axis=1)
    return (model.logits(params, last_b1d, cfg=cfg)[:, 0], cache), aux.get("lost")


@jax.jit
def _first(choice: Choice, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The count comes from here to lie where the model lies: `decode` compiles again for a state that lies elsewhere.
    return *choice.take(logits_bv, jnp.int32(0)), jnp.int32(1)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(params: Any, state: State, choice: Choice, steps: jax.Array, *, cfg: Any) -> tuple[State, Made]:
    """Makes up to `steps` (at most CHUNK) more tokens in every row that is not done.

    Ends early when all rows are done or the next token of one of them no longer fits the cache. Rows that are done
    are computed along, but nothing of them changes.
    """
    model = registry.of(cfg)
    b = state.token.shape[0]

    def going(loop: tuple[jax.Array, State, Made]) -> jax.Array:
        i, state, _ = loop
        stuck = jnp.any(model.full(state.cache) & ~state.done)
        return (i < steps) & ~stuck & ~jnp.all(state.done)

    def step(loop: tuple[jax.Array, State, Made]) -> tuple[jax.Array, State, Made]:
        i, state, made = loop
        live = ~state.done
        batch = Batch(state.token[:, None], state.cache.length[:, None], live[:, None].astype(jnp.int32))
        x_b1d, cache, _ = model.hidden(params, batch, cfg=cfg, cache=state.cache)
        held_b, read_b = (jnp.where(live, n, 0.0) for n in model.cache_use(cache, cfg))
        token, stopped = choice.take(model.logits(params, x_b1d, cfg=cfg)[:, 0], state.made)
        done = state.done | stopped
        made = Made(
            tokens=made.tokens.at[:, i].set(jnp.where(done, -1, token)),
            reads=made.reads + read_b,
            peak=jnp.maximum(made.peak, held_b.sum()),
        )
        return i + 1, State(cache, token, done, state.made + 1), made

    nothing = Made(jnp.full((b, CHUNK), -1, jnp.int32), jnp.zeros(b, jnp.float32), jnp.float32(0))
    _, state, made = jax.lax.while_loop(going, step, (jnp.int32(0), state, nothing))
    return state, made
