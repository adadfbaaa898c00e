"""The compiled loop of generation: tokens are chosen and read, one after another."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import memory as memory_lib
from atom_jax.models import registry
from atom_jax.models.family import Codec
from atom_jax.session import sampling
from atom_jax.typing import Batch

# Tokens that one call of `decode` can make in each row.
CHUNK = 128


@struct.dataclass
class State:
    """Where generation stands.

    memory: what the model keeps. token: i32 [b], chosen, but not yet read to the end by the model. done: bool [b].
    made: i32 [b], tokens chosen so far.
    """

    memory: Any
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

    tokens: i32 [b, CHUNK], -1 where there is none. held, read: f32 [b, CHUNK], cache entries that the row held after
    reading the token before each of these (or before a stop id), and that it read; 0 where there is none. peak: f32,
    the most entries that unfinished rows held together. All three are averaged over layers and heads.
    """

    tokens: jax.Array
    held: jax.Array
    read: jax.Array
    peak: jax.Array

    @classmethod
    def nothing(cls, b: int) -> Made:
        """Of b rows, nothing."""
        zeros = jnp.zeros((b, CHUNK), jnp.float32)
        return cls(jnp.full((b, CHUNK), -1, jnp.int32), zeros, zeros, jnp.float32(0))


@functools.partial(jax.jit, static_argnames="cfg")
def begin(
    params: Any, length_b: jax.Array, token_b: jax.Array, x_bd: jax.Array | None, open_b: jax.Array | None,
    choice: Choice, *, cfg: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The first tokens after what a session has read (see `Session`; length_b: i32 [b], its length), or the latest
    ones, where these wait to be read or to get their form; whether a row ends with it, bool [b]; and how many tokens
    were chosen, i32 [b]."""
    # All of it comes from here to lie where the model lies: `decode` compiles again for a state that lies elsewhere.
    made = jnp.zeros_like(token_b)
    if x_bd is None:
        return token_b, made > 0, made
    logits_bv = registry.of(cfg).logits(params, x_bd[:, None], cfg=cfg)[:, 0]
    token, done = choice.take(logits_bv, jnp.int32(0))
    if open_b is None:
        return token, done, made + 1
    # No step of its own has this number.
    same = choice.codec.begin(logits_bv, token_b, length_b == 1, choice.draw(jnp.int32(-1)))
    return jnp.where(open_b, same, token), done & ~open_b, (~open_b).astype(jnp.int32)


def advance(
    params: Any, state: State, choice: Choice, live_b: jax.Array, *, cfg: Any
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """One step of the rows `live_b`: the state after it; the tokens i32 [b] that were chosen, -1 for a stop id; the
    rows that have one, bool [b]; and what the model says in these, f32 [b, v]."""
    model = registry.of(cfg)
    batch = Batch(state.token[:, None], state.memory.length[:, None], live_b[:, None].astype(jnp.int32))
    x_b1d, memory, ready = model.step(params, batch, cfg=cfg, cache=state.memory)
    logits_bv = model.logits(params, x_b1d, cfg=cfg)[:, 0]
    token, stopped = choice.take(logits_bv, state.made)
    kept, done = jnp.where(ready, token, state.token), state.done | (ready & stopped)
    return State(memory, kept, done, state.made + ready), jnp.where(stopped, -1, token), ready, logits_bv


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(params: Any, state: State, choice: Choice, until: jax.Array, *, cfg: Any) -> tuple[State, Made]:
    """Makes tokens until every row that is not done has `until` of them, at most CHUNK more than it had.

    Ends early when the next token of one of these rows no longer fits the memory. Rows need not keep step with each
    other (`step` of the model says which are ready for their next token), and nothing changes in rows that are done
    or have enough, although they are computed along.
    """
    rows, before = jnp.arange(state.token.shape[0]), state.made

    def live(state: State) -> jax.Array:
        return ~state.done & (state.made < until)

    def going(loop: tuple[State, Made]) -> jax.Array:
        live_b = live(loop[0])
        return jnp.any(live_b) & ~jnp.any(memory_lib.full(loop[0].memory) & live_b)

    def step(loop: tuple[State, Made]) -> tuple[State, Made]:
        state, made = loop
        after, token, ready, _ = advance(params, state, choice, live(state), cfg=cfg)
        held_b, read_b = memory_lib.use(after.memory)
        # Past the end, where nothing is written, in rows without a new token.
        at = jnp.where(ready, state.made - before, CHUNK)
        made = Made(
            tokens=made.tokens.at[rows, at].set(token, mode="drop"),
            held=made.held.at[rows, at].set(held_b, mode="drop"),
            read=made.read.at[rows, at].set(read_b, mode="drop"),
            peak=jnp.maximum(made.peak, jnp.where(state.done, 0.0, held_b).sum()),
        )
        return after, made

    return jax.lax.while_loop(going, step, (state, Made.nothing(len(rows))))


@functools.cache
def beside() -> dict[str, str] | None:
    """Options of the compiler for calls that run next to each other on the cores of a CPU.

    Of the libraries that XLA has for products there, one has threads of its own, which get in the way of such calls:
    it is left out where the installed XLA can do without.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return None
    return options


@functools.cache
def decode_beside() -> Any:
    """`decode` for calls that run `beside` each other."""
    return jax.jit(decode.__wrapped__, static_argnames="cfg", donate_argnames="state", compiler_options=beside())
