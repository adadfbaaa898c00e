"""The compiled halves of generation: reading prompts, and choosing tokens one after another."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import memory
from atom_jax.models import registry
from atom_jax.models.family import Codec
from atom_jax.session import reading, sampling
from atom_jax.typing import Batch

# Tokens that one call of `decode` can make in each row.
CHUNK = 128


@struct.dataclass
class State:
    """Where generation stands.

    cache: the model's memory. token: i32 [b], chosen, but not yet read to the end by the model. done: bool [b].
    made: i32 [b], tokens chosen so far.
    """

    cache: Any
    token: jax.Array
    done: jax.Array
    made: jax.Array


@struct.dataclass
class Choice:
    """How next tokens are chosen. keys [b]: one PRNG key per row; stop_ids: i32 [n], where -1 matches none; codec:
    what the ids mean."""

    keys: jax.Array
    how: sampling.Sampler
    stop_ids: jax.Array
    codec: Codec = struct.field(pytree_node=False, default=Codec())

    def take(self, logits_bv: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens i32 [b] and whether each is a stop id, bool [b]."""
        token = self.codec.choose(logits_bv, self.draw(step))
        return token, jnp.any(token[:, None] == self.stop_ids[None], axis=1)

    def draw(self, step: jax.Array) -> sampling.Draw:
        """One choice in every row. step: i32, one for all rows or [b]."""
        return sampling.Draw(self.keys, step, self.how)


@struct.dataclass
class Made:
    """What one call made.

    tokens: i32 [b, CHUNK], -1 where there is none. reads: f32 [b], cache entries that each row read; peak: f32, the
    most entries that unfinished rows held together; both averaged over layers and heads.
    """

    tokens: jax.Array
    reads: jax.Array
    peak: jax.Array


def start(
    params: Any, ids_bt: Any, length_b: Any, choice: Choice, suffix: Any = None, *,
    cfg: Any, capacity: int, unroll: bool,
) -> tuple[State, jax.Array]:  # fmt: skip
    """Reads prompts and chooses the first new token of every row.

    ids_bt: i32, prompts padded on the right; length_b: i32, their lengths, at least 1. unroll: one cache per layer
    instead of a stacked one. suffix: as in Batch. Returns the state and the tokens i32 [b], -1 where a stop id was
    chosen, and everywhere where the form of the prompt's last token is to be chosen first (`Codec.pending`).
    """
    how = reading.plan(cfg)
    if how.part is None:
        whole = functools.partial(read_prompt, params, ids_bt, length_b, suffix, capacity=capacity)
        logits_bv, cache = reading.exactly(lambda cfg: whole(cfg=cfg), cfg)
    else:
        parts = -(-int(length_b.max()) // how.part)
        last_bd, cache, _ = reading.read(params, ids_bt[:, : parts * how.part], length_b, cfg=cfg)
        logits_bv = _logits(params, last_bd, cfg=cfg)
    cache = memory.unstack(cache) if unroll else cache
    if choice.codec.pending:
        return _pending(cache, logits_bv, choice, ids_bt, length_b, length_b == 1, cfg)
    return _begin(cache, logits_bv, choice, cfg)


def go_on(
    params: Any, state: State, ids_bt: Any, length_b: Any, choice: Choice, *, cfg: Any
) -> tuple[State, jax.Array]:
    """Reads further tokens of every row after those of an earlier generation, whose memory is given up; as `start`.

    ids_bt: i32, padded on the right, with `state.token` in front. length_b: i32, at least 2 (1 in transformers).
    """
    cache = state.cache
    if reading.plan(cfg).waits:
        cache = _finish(params, memory.grow(cache), state.token, cfg=cfg)
        ids_bt, length_b = ids_bt[:, 1:], length_b - 1
    last_bd, cache, _ = reading.read(params, ids_bt, length_b, cache, cfg=cfg)
    logits_bv = _logits(params, last_bd, cfg=cfg)
    if choice.codec.pending:
        return _pending(cache, logits_bv, choice, ids_bt, length_b, length_b < 1, cfg)
    return _begin(cache, logits_bv, choice, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _finish(params: Any, cache: Any, token_b: jax.Array, *, cfg: Any) -> Any:
    """The memory once the token that every row chose last has been read to the end, in rows that wait, too."""

    def step(loop: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        cache, left_b = loop
        batch = Batch(token_b[:, None], cache.length[:, None], left_b[:, None].astype(jnp.int32))
        _, cache, ready_b = registry.of(cfg).step(params, batch, cfg=cfg, cache=cache)
        return cache, left_b & ~ready_b

    everyone = jnp.ones(token_b.shape, bool)
    return jax.lax.while_loop(lambda loop: jnp.any(loop[1]), step, (cache, everyone))[0]


def _pending(
    cache: Any, logits_bv: jax.Array, choice: Choice, ids_bt: Any, length_b: Any, first_b: Any, cfg: Any
) -> tuple[State, jax.Array]:
    """Nothing is made yet: the last of the tokens, the first one of its text in rows `first_b`, gets its form."""
    token, done, made = _last(choice, logits_bv, ids_bt, length_b, first_b)
    return State(_trimmed(cache, cfg), token, done, made), jnp.full_like(token, -1)


def _begin(cache: Any, logits_bv: jax.Array, choice: Choice, cfg: Any) -> tuple[State, jax.Array]:
    token, done, made = _first(choice, logits_bv)
    return State(_trimmed(cache, cfg), token, done, made), jnp.where(done, -1, token)


def _trimmed(cache: Any, cfg: Any) -> Any:
    """The memory no larger than what is retained: of every layer alone where they are apart."""
    return memory.grow(cache) if reading.plan(cfg).shrinks else cache


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params: Any, x_bd: jax.Array, *, cfg: Any) -> jax.Array:
    return registry.of(cfg).logits(params, x_bd[:, None], cfg=cfg)[:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "capacity"))
def read_prompt(
    params: Any, ids_bt: jax.Array, length_b: jax.Array, suffix: Any = None, *, cfg: Any, capacity: int
) -> tuple[Any, Any]:
    """(logits after the last token of every prompt, or, where the codec has that pending, after the one before it,
    float32 [b, v], and the cache), and what was lost."""
    model = registry.of(cfg)
    b, t = ids_bt.shape
    positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    batch = Batch(ids_bt, positions, (positions < length_b[:, None]).astype(jnp.int32), suffix=suffix)
    x_btd, cache, aux = reading.prompt(params, batch, cfg=cfg, capacity=capacity)
    last = jnp.maximum(length_b - 1, 0)
    last_b1d = jnp.take_along_axis(x_btd, last[:, None, None], axis=1)
    return (model.logits(params, last_b1d, cfg=cfg)[:, 0], cache), aux.get("lost")


@jax.jit
def _first(choice: Choice, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The count comes from here to lie where the model lies: `decode` compiles again for a state that lies elsewhere.
    token, done = choice.take(logits_bv, jnp.int32(0))
    return token, done, jnp.ones_like(token)


@jax.jit
def _last(
    choice: Choice, logits_bv: jax.Array, ids_bt: jax.Array, length_b: jax.Array, first_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    token = jnp.take_along_axis(ids_bt, (length_b - 1)[:, None], axis=1)[:, 0]
    # No step of its own has this number.
    token = choice.codec.begin(logits_bv, token, first_b, choice.draw(jnp.int32(-1)))
    return token, token < 0, jnp.zeros_like(token)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(params: Any, state: State, choice: Choice, until: jax.Array, *, cfg: Any) -> tuple[State, Made]:
    """Makes tokens until every row that is not done has `until` of them, at most CHUNK more than it had.

    Ends early when the next token of one of these rows no longer fits the cache. Rows need not keep step with each
    other (`step` of the model says which are ready for their next token), and nothing changes in rows that are done
    or have enough, although they are computed along.
    """
    model = registry.of(cfg)
    rows, before = jnp.arange(state.token.shape[0]), state.made

    def live(state: State) -> jax.Array:
        return ~state.done & (state.made < until)

    def going(loop: tuple[State, Made]) -> jax.Array:
        live_b = live(loop[0])
        return jnp.any(live_b) & ~jnp.any(memory.full(loop[0].cache) & live_b)

    def step(loop: tuple[State, Made]) -> tuple[State, Made]:
        state, made = loop
        batch = Batch(state.token[:, None], state.cache.length[:, None], live(state)[:, None].astype(jnp.int32))
        x_b1d, cache, ready = model.step(params, batch, cfg=cfg, cache=state.cache)
        held_b, read_b = memory.use(cache)
        token, stopped = choice.take(model.logits(params, x_b1d, cfg=cfg)[:, 0], state.made)
        # Past the end, where nothing is written, in rows without a new token.
        at = jnp.where(ready, state.made - before, CHUNK)
        made = Made(
            tokens=made.tokens.at[rows, at].set(jnp.where(stopped, -1, token), mode="drop"),
            reads=made.reads + jnp.where(ready, read_b, 0.0),
            peak=jnp.maximum(made.peak, jnp.where(state.done, 0.0, held_b).sum()),
        )
        state = State(cache, jnp.where(ready, token, state.token), state.done | (ready & stopped), state.made + ready)
        return state, made

    nothing = Made(jnp.full((len(rows), CHUNK), -1, jnp.int32), jnp.zeros(len(rows), jnp.float32), jnp.float32(0))
    return jax.lax.while_loop(going, step, (state, nothing))


@functools.cache
def decode_beside() -> Any:
    """`decode` for calls that run next to each other on the cores of a CPU.

    Of the libraries that XLA has for products there, one has threads of its own, which get in the way of such calls:
    it is left out where the installed XLA can do without.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return decode
    return jax.jit(decode.__wrapped__, static_argnames="cfg", donate_argnames="state", compiler_options=options)
