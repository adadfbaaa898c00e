"""The compiled loop of generation with drafts: a call of the model reads the token that was chosen last and a draft
of what follows, and as much of it is kept as would have been chosen anyway.

The choice of a row's token number j depends on the logits, the row's key and j alone (`sampling.choose`). So what is
chosen after each token of a draft is what one token at a time gives, greedy or drawn, whatever the draft is; the
first that differs from it ends the draft, and is itself the next token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import memory as memory_lib
from atom_jax.models import registry
from atom_jax.nn.embedding import lookup
from atom_jax.session import programs
from atom_jax.session.decode import CHUNK, Choice, Made, State, advance, beside
from atom_jax.session.drafts.drafter import Draft, Drafter, Model, Read, Text
from atom_jax.typing import Batch
from atom_jax.units import waits

# Credit of a row, in calls of one token: how much drafts may cost before they have gained anything; the most that a
# row saves up; and what it gets for every call without a draft, a share of that call's time.
START, MOST, REFUND = 1.0, 4.0, 0.01


@struct.dataclass
class Own:
    """What drafting keeps: the text; what the drafter remembers; and the credit of every row, f32 [b]. Where a row
    has none left, its drafts have cost more than they gained, and it makes none until it has some again."""

    text: Text
    drafter: Any
    credit: jax.Array


@struct.dataclass
class Tally:
    """What the calls of one run of the loop came to.

    calls, wide: i32 [], calls of the model, and how many of them had a draft. tried, accepted: i32 [b], tokens of
    drafts. reached: i32 [n + 1], drafts (of wide calls, one per row that had one) of which so many tokens were
    accepted. steps: i32 [b], calls in which the row took part. queries: f32 [b], entries that the queries of all
    calls read, drafts included, where each reads by itself.
    """

    calls: jax.Array
    wide: jax.Array
    tried: jax.Array
    accepted: jax.Array
    reached: jax.Array
    steps: jax.Array
    queries: jax.Array

    @classmethod
    def zero(cls, b: int, n: int) -> Tally:
        """Of no call."""
        rows, one = jnp.zeros(b, jnp.int32), jnp.int32(0)
        return cls(one, one, rows, rows, jnp.zeros(n + 1, jnp.int32), rows, jnp.zeros(b, jnp.float32))


@struct.dataclass
class Said:
    """What a call chose. tokens: i32 [b, n + 1], -1 for a stop id, of which the first `count`, i32 [b], are the
    row's."""

    tokens: jax.Array
    count: jax.Array


def decode(
    params: Any, learned: Any, state: State, own: Own, choice: Choice, until: jax.Array, price: jax.Array,
    *, cfg: Any, drafter: Drafter, n: int,
) -> tuple[State, Own, Made, Tally]:  # fmt: skip
    """As `session.decode.decode`, with drafts of up to n tokens.

    learned: the drafter's own arrays, or None. price: f32 [], what a call with drafts costs more than one with a
    single token, as a share of the latter; negative: there are to be no drafts.
    """
    b = len(state.token)
    rows, before = jnp.arange(b), state.made

    def live(state: State) -> jax.Array:
        return ~state.done & (state.made < until)

    def going(loop: tuple) -> jax.Array:
        return jnp.any(live(loop[0])) & ~short(loop[0], until, n)

    def propose(memory: Any, known: Any, text: Text, made_b: jax.Array) -> Draft:
        return drafter.propose(known, text, n, asked(params, learned, memory, made_b, choice, cfg))

    def nothing(*_: Any) -> Draft:
        return Draft(jnp.zeros((b, n), jnp.int32), jnp.zeros(b, jnp.int32))

    def step(loop: tuple) -> tuple:
        state, own, made, tally = loop
        live_b = live(state)
        # A draft is read together, by rows of which none waits for others.
        fits = ~jnp.any((memory_lib.full(state.memory, n + 1) | waits(state.memory)) & live_b)
        # Making drafts may cost something, too.
        tries = fits & (price >= 0) & jnp.any(live_b & (own.credit > 0))
        draft = jax.lax.cond(
            tries, functools.partial(propose, state.memory), nothing, own.drafter, own.text, state.made
        )
        count_b = jnp.where(live_b, jnp.minimum(draft.count, until - state.made - 1), 0)
        draft = Draft(draft.tokens, count_b)
        eager_b = (count_b > 0) & (own.credit > 0)
        wide = tries & jnp.any(eager_b)
        after, known, said = _either(
            wide,
            lambda state, known: _verify(params, cfg, drafter, choice, state, known, draft, live_b),
            lambda state, known: _single(params, cfg, drafter, choice, state, known, draft, live_b),
            state, own.drafter, Said(jnp.zeros((b, n + 1), jnp.int32), jnp.zeros(b, jnp.int32)),
        )  # fmt: skip
        took = after.made - state.made
        accepted_b = jnp.maximum(took - 1, 0)
        cost_b = jnp.where(eager_b, price * jnp.sum(live_b) / jnp.maximum(jnp.sum(eager_b), 1), 0.0)
        earned_b = jnp.where(wide, accepted_b - cost_b, jnp.where(own.credit < START, REFUND, 0.0))
        own = Own(
            own.text.add(jnp.maximum(said.tokens, 0), said.count),
            known,
            jnp.minimum(own.credit + jnp.where(live_b, earned_b, 0.0), MOST),
        )
        held_b, read_b = memory_lib.use(after.memory)
        offsets = jnp.arange(n + 1)[None]
        # Past the end, where nothing is written, what a row has not got.
        at = jnp.where(offsets < said.count[:, None], (state.made - before)[:, None] + offsets, CHUNK + offsets)
        # A call reads once for all that it gives.
        first = jnp.where(took > 0, state.made - before, CHUNK)
        made = Made(
            tokens=made.tokens.at[rows[:, None], at].set(said.tokens, mode="drop", unique_indices=True),
            held=made.held.at[rows, first].set(held_b, mode="drop"),
            read=made.read.at[rows, first].set(read_b, mode="drop"),
            peak=jnp.maximum(made.peak, jnp.where(state.done, 0.0, held_b).sum()),
        )
        tried_b = jnp.where(wide, count_b, 0)
        tally = Tally(
            calls=tally.calls + 1,
            wide=tally.wide + wide,
            tried=tally.tried + tried_b,
            accepted=tally.accepted + accepted_b,
            reached=tally.reached.at[jnp.where(tried_b > 0, accepted_b, n + 1)].add(1, mode="drop"),
            steps=tally.steps + live_b,
            queries=tally.queries + jnp.where(took > 0, read_b * (tried_b + 1), 0.0),
        )
        return after, own, made, tally

    return jax.lax.while_loop(going, step, (state, own, Made.nothing(b), Tally.zero(b, n)))


def asked(params: Any, learned: Any, memory: Any, made_b: jax.Array, choice: Choice, cfg: Any) -> Model:
    """The model as drafters ask it, with this memory, where so many tokens, i32 [b], have been chosen."""
    model = registry.of(cfg)

    def embed(token_b: jax.Array) -> jax.Array:
        return lookup(params["embed"], token_b[:, None], cfg.dtype)[:, 0]

    def logits(x_bd: jax.Array) -> jax.Array:
        return model.logits(params, x_bd[:, None], cfg=cfg)[:, 0]

    def stale(memory: Any, token_b: jax.Array) -> tuple[jax.Array, Any]:
        batch = Batch(token_b[:, None], memory.length[:, None], jnp.ones((len(token_b), 1), jnp.int32))
        x_b1d, memory = model.stale(params, batch, cfg=cfg, cache=memory)
        return x_b1d[:, 0], memory

    def choose(logits_bv: jax.Array, i: Any) -> jax.Array:
        return choice.take(logits_bv, made_b + i)[0]

    apart = (lambda: model.outer(memory), stale) if model.stale is not None else (None, None)
    return Model(learned, embed, logits, choose, *apart)


def short(state: State, until: jax.Array, n: int) -> jax.Array:
    """bool []: whether a row that goes on to `until` tokens has no room for the next one, or for a draft of n, where
    it makes more tokens than that."""
    left_b = jnp.where(state.done, 0, until - state.made)
    single_b, draft_b = (memory_lib.full(state.memory, more) for more in (1, n + 1))
    return jnp.any(single_b & (left_b > 0)) | jnp.any(draft_b & (left_b > n + 1))


lacks_room = jax.jit(short, static_argnames="n")


def _either(first: jax.Array, one: Any, other: Any, state: State, known: Any, said: Said) -> tuple[State, Any, Said]:
    """What `one` of the state gives where `first`, else what the `other` gives.

    As loops of one turn or none, which XLA computes in place: a conditional would copy the memory.
    """

    def loop(on: jax.Array, call: Any, carry: tuple) -> tuple:
        def turn(carry: tuple) -> tuple:
            return jnp.zeros_like(on), *call(carry[1], carry[2])

        return jax.lax.while_loop(lambda carry: carry[0], turn, (on, *carry))[1:]

    return loop(~first, other, loop(first, one, (state, known, said)))


def _single(
    params: Any, cfg: Any, drafter: Drafter, choice: Choice,
    state: State, known: Any, draft: Draft, live_b: jax.Array,
) -> tuple[State, Any, Said]:  # fmt: skip
    """The step without drafts."""
    after, token, ready, logits_bv, x_b1d = advance(params, state, choice, live_b, cfg=cfg)
    one_b = ready.astype(jnp.int32)
    read = Read(state.token[:, None], one_b, logits_bv[:, None], x_b1d, one_b)
    tokens = jnp.pad(token[:, None], ((0, 0), (0, draft.tokens.shape[1])))
    return after, drafter.observe(known, read), Said(tokens, one_b)


def _verify(
    params: Any, cfg: Any, drafter: Drafter, choice: Choice,
    state: State, known: Any, draft: Draft, live_b: jax.Array,
) -> tuple[State, Any, Said]:  # fmt: skip
    """The step that reads drafts, and keeps what is accepted of them."""
    model = registry.of(cfg)
    ids_bn = jnp.concatenate([state.token[:, None], draft.tokens], axis=1)
    b, n = ids_bn.shape
    count_b = jnp.where(live_b, draft.count + 1, 0)
    x_bnd, pending = programs.attempt(params, state.memory, ids_bn, count_b, cfg=cfg)
    logits_bnv = model.logits(params, x_bnd, cfg=cfg)
    each = choice.map(lambda x: jnp.repeat(x, n, axis=0))
    steps = state.made[:, None] + jnp.arange(n)[None]
    token_bn, stops_bn = (x.reshape(b, n) for x in each.take(logits_bnv.reshape(b * n, -1), steps.reshape(-1)))
    right = (token_bn[:, :-1] == draft.tokens) & ~stops_bn[:, :-1]
    right &= jnp.arange(n - 1)[None] < draft.count[:, None]
    accepted_b = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    taken_b = jnp.where(live_b, accepted_b + 1, 0)
    memory = programs.commit(params, state.memory, pending, ids_bn, taken_b, cfg=cfg)
    newest, stopped = (jnp.take_along_axis(x, accepted_b[:, None], axis=1)[:, 0] for x in (token_bn, stops_bn))
    after = State(
        memory, jnp.where(live_b, newest, state.token), state.done | (live_b & stopped), state.made + taken_b
    )
    known = drafter.observe(known, Read(ids_bn, count_b, logits_bnv, x_bnd, taken_b))
    return after, known, Said(jnp.where(stops_bn, -1, token_bn), taken_b)


@functools.cache
def compiled() -> Any:
    """`decode` as a program, with the options of `beside`. All products of SmolLM2 with 1, 2, 4, 8 and 16 rows take
    two cores of an AMD EPYC virtual machine 23, 44, 50, 58 and 76 ms so, and 26, 43, 66, 74 and 100 ms with the
    library that is left out."""
    static, donated = ("cfg", "drafter", "n"), ("state", "own")
    return jax.jit(decode, static_argnames=static, donate_argnames=donated, compiler_options=beside())
