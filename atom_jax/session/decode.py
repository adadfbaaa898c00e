"""The compiled loop of generation: tokens are chosen and read, one after another."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
# The likeliest tokens that are named where a row wants to know what the model says.
NAMED = 20


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
    """How next tokens are chosen. keys [b]: one PRNG key per row; stop_ids: i32 [n], or [b, n], those of each row,
    where -1 matches none; codec: what the ids mean; asks: bool [b], rows for which `Said` is to be told, or None,
    where nobody is told."""

    keys: jax.Array
    how: sampling.Sampler
    stop_ids: jax.Array
    codec: Codec = struct.field(pytree_node=False, default=Codec())
    asks: jax.Array | None = None

    @property
    def each(self) -> Choice:
        """The same with a sampler and stop ids for every row."""
        return _each(self)

    def map(self, fn: Callable[..., jax.Array], *others: Choice) -> Choice:
        """The choice whose arrays are `fn` of those of this one, and of others; all have rows, as `each` gives."""
        return jax.tree.map(fn, self, *others)

    def take(self, logits_bv: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens i32 [b] and whether each is a stop id, bool [b]."""
        token = self.codec.choose(logits_bv, self.draw(step))
        ends = self.stop_ids if self.stop_ids.ndim == 2 else self.stop_ids[None]
        return token, jnp.any(token[:, None] == ends, axis=1)

    def draw(self, step: jax.Array) -> sampling.Draw:
        """One choice in every row. step: i32, one for all rows or [b]."""
        return sampling.Draw(self.keys, step, self.how)


@jax.jit
def _each(choice: Choice) -> Choice:
    b, ends = len(choice.keys), jnp.asarray(choice.stop_ids, jnp.int32)
    ends = ends if ends.ndim == 2 else jnp.tile(ends[None], (b, 1))
    how, asks = jax.tree.map(lambda x: jnp.broadcast_to(x, (b,)), (choice.how, choice.asks))
    return choice.replace(how=how, stop_ids=ends, asks=asks)


@struct.dataclass
class Said:
    """What the model says where tokens were chosen, whatever they were chosen by: f32 [...], log-probability of the
    token; i32 and f32 [..., NAMED], the likeliest tokens, and theirs. Arbitrary in rows that do not ask."""

    logprob: jax.Array
    ids: jax.Array
    logprobs: jax.Array

    @classmethod
    def nothing(cls, *shape: int) -> Said:
        """Zeros."""
        most = (*shape, NAMED)
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(most, jnp.int32), jnp.zeros(most, jnp.float32))


def said(logits_bv: jax.Array, token_b: jax.Array, asks_b: jax.Array) -> Said:
    """Of one token per row; nothing is computed where no row asks."""
    b, v = logits_bv.shape

    def tell() -> Said:
        all_bv = jax.nn.log_softmax(logits_bv.astype(jnp.float32), axis=-1)
        top, ids = jax.lax.top_k(all_bv, min(NAMED, v))
        pad = lambda x, fill: jnp.pad(x, ((0, 0), (0, NAMED - x.shape[1])), constant_values=fill)  # noqa: E731
        own = jnp.take_along_axis(all_bv, token_b[:, None], axis=1)[:, 0]
        return Said(own, pad(ids.astype(jnp.int32), -1), pad(top, -jnp.inf))

    return jax.lax.cond(jnp.any(asks_b), tell, lambda: Said.nothing(b))


@struct.dataclass
class Made:
    """What one call made.

    tokens: i32 [b, CHUNK], -1 where there is none. held, read: f32 [b, CHUNK], cache entries that the row held after
    reading the token before each of these (or before a stop id), and that it read; 0 where there is none. peak: f32,
    the most entries that unfinished rows held together. All three are averaged over layers and heads. said: [b,
    CHUNK, ...], or None where nobody is told.
    """

    tokens: jax.Array
    held: jax.Array
    read: jax.Array
    peak: jax.Array
    said: Said | None = None

    @classmethod
    def nothing(cls, b: int, told: bool = False) -> Made:
        """Of b rows, nothing."""
        zeros = jnp.zeros((b, CHUNK), jnp.float32)
        none = jnp.full((b, CHUNK), -1, jnp.int32)
        return cls(none, zeros, zeros, jnp.float32(0), Said.nothing(b, CHUNK) if told else None)


@functools.partial(jax.jit, static_argnames="cfg")
def begin(
    params: Any, length_b: jax.Array, token_b: jax.Array, x_bd: jax.Array | None, open_b: jax.Array | None,
    choice: Choice, *, cfg: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, Said | None]:  # fmt: skip
    """The first tokens after what a session has read (see `Session`; length_b: i32 [b], its length), or the latest
    ones, where these wait to be read or to get their form; whether a row ends with it, bool [b]; how many tokens
    were chosen, i32 [b]; and what the model says of them, where somebody is told."""
    # All of it comes from here to lie where the model lies: `decode` compiles again for a state that lies elsewhere.
    made = jnp.zeros_like(token_b)
    if x_bd is None:
        return token_b, made > 0, made, None
    logits_bv = registry.of(cfg).logits(params, x_bd[:, None], cfg=cfg)[:, 0]
    token, done = choice.take(logits_bv, jnp.int32(0))
    told = None if choice.asks is None else said(logits_bv, token, choice.asks)
    if open_b is None:
        return token, done, made + 1, told
    # No step of its own has this number.
    same = choice.codec.begin(logits_bv, token_b, length_b == 1, choice.draw(jnp.int32(-1)))
    return jnp.where(open_b, same, token), done & ~open_b, (~open_b).astype(jnp.int32), told


def advance(
    params: Any, state: State, choice: Choice, live_b: jax.Array, *, cfg: Any
) -> tuple[State, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of the rows `live_b`: the state after it; the tokens i32 [b] that were chosen, -1 for a stop id; the
    rows that have one, bool [b]; and what the model says in these, f32 [b, v], from final states [b, 1, d]."""
    model = registry.of(cfg)
    batch = Batch(state.token[:, None], state.memory.length[:, None], live_b[:, None].astype(jnp.int32))
    x_b1d, memory, ready = model.step(params, batch, cfg=cfg, cache=state.memory)
    logits_bv = model.logits(params, x_b1d, cfg=cfg)[:, 0]
    token, stopped = choice.take(logits_bv, state.made)
    kept, done = jnp.where(ready, token, state.token), state.done | (ready & stopped)
    return State(memory, kept, done, state.made + ready), jnp.where(stopped, -1, token), ready, logits_bv, x_b1d


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
        after, token, ready, logits_bv, _ = advance(params, state, choice, live(state), cfg=cfg)
        held_b, read_b = memory_lib.use(after.memory)
        told = made.said
        # Past the end, where nothing is written, in rows without a new token.
        at = jnp.where(ready, state.made - before, CHUNK)
        if told is not None:
            now = said(logits_bv, after.token, choice.asks & ready)
            told = jax.tree.map(lambda all, one: all.at[rows, at].set(one, mode="drop"), told, now)
        made = Made(
            tokens=made.tokens.at[rows, at].set(token, mode="drop"),
            held=made.held.at[rows, at].set(held_b, mode="drop"),
            read=made.read.at[rows, at].set(read_b, mode="drop"),
            peak=jnp.maximum(made.peak, jnp.where(state.done, 0.0, held_b).sum()),
            said=told,
        )
        return after, made

    return jax.lax.while_loop(going, step, (state, Made.nothing(len(rows), choice.asks is not None)))


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
