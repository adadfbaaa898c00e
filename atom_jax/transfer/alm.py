"""Approximate likelihood matching: a student with one tokenizer learns from a teacher with another what their aligned
chunks of text are worth (Minixhofer et al., 2025, 2503.20083).

Chunks are numbers of tokens, i32 [b, t] and -1 for tokens of none (`tokenizers.alignment`): sums over chunks are
segment sums, and nothing is as large as tokens times chunks. Of the models only log-probabilities at the tokens are
needed (`nn.scoring`: minus "nats", and "among" for what may end a chunk). c is the letter of chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.chunking.segments import gather, segment_sum
from atom_jax.transfer.byteify import log1mexp
from atom_jax.typing import AtomError

_LOWEST = -1e4  # log-probability of what can't be; finite, so that gradients are


@struct.dataclass
class Chunked:
    """What one model says of its tokens.

    logp: f32 [b, t], log-probability of each token after those before it; that of a row's first token doesn't count.
    chunks: i32 [b, t], never decreasing where they aren't -1, which stands behind all others. counts: bool [b, t],
    tokens that are scored. ends: f32 [b, t], log-probability that after this token a boundary follows (a token that
    begins with a space or a line break, or a special one), or None.
    """

    logp: jax.Array
    chunks: jax.Array
    counts: jax.Array
    ends: jax.Array | None = None


def _binary(t: jax.Array, s: jax.Array) -> jax.Array:
    return -(jnp.exp(t) * s + (1 - jnp.exp(t)) * log1mexp(s))


def _reverse(t: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.exp(s) * (s - t) + (1 - jnp.exp(s)) * (log1mexp(s) - log1mexp(t))


# What is compared, of log-probabilities of chunks divided by the temperature, teacher's and student's, both below 0.
DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "binary": _binary,
    "reverse": _reverse,
    "absolute": lambda t, s: jnp.abs(t - s),
    "absolute_exp": lambda t, s: jnp.abs(jnp.exp(t) - jnp.exp(s)),
    "limit": lambda t, s: (t - s) + t * (jnp.log(-s) - jnp.log(-t)),
    "k2": lambda t, s: jnp.square(t - s) / 2,
    "k3": lambda t, s: jnp.exp(t - s) - 1 - (t - s),
}


@dataclasses.dataclass(frozen=True)
class ALM:
    """How chunks are compared.

    divergence: one of DIVERGENCES; binary is the paper's, the cross-entropy of two coins; limit is what the coins'
    divergence tends to as tau grows. tau, epsilon: temperature (of absolute and limit it is 1), and the distance
    from certainty.
    debias: both sides include that a boundary follows, which takes out what longer tokens would have taken.
    merge: chunks after which the teacher's probability of a boundary is not above this join the next; None: none do.
    """

    divergence: str = "binary"
    tau: float = 100.0
    epsilon: float = 1e-6
    debias: bool = True
    merge: float | None = 0.1

    def __post_init__(self):
        config.check(self, tau=(1e-6, 1e6), epsilon=(0, 1), merge=(0, 1))
        if self.divergence not in DIVERGENCES:
            raise AtomError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")


def loss(teacher: Chunked, student: Chunked, how: ALM, size: int) -> tuple[jax.Array, jax.Array]:
    """The sum over chunks f32 [], and how many there are f32 []: those of which the teacher scores a token.

    size: most chunks of a row. Both sides need `ends` where `how` asks for boundaries.
    """
    if (how.debias or how.merge is not None) and (teacher.ends is None or student.ends is None):
        raise AtomError("alm: debias and merge need the log-probabilities of boundaries")
    group_bc = _groups(teacher, how.merge, size)
    sides = []
    for side in (teacher, student):
        chunks = jnp.where(side.chunks < 0, size, jnp.take_along_axis(group_bc, jnp.maximum(side.chunks, 0), axis=1))
        counts = (side.counts & (side.chunks >= 0)).at[:, 0].set(False)
        logp_bt = jnp.where(counts, jnp.maximum(side.logp, _LOWEST), 0.0)
        m_bc = segment_sum(logp_bt, chunks, size)
        number_bc = segment_sum(counts.astype(jnp.float32), chunks, size)
        if how.debias:
            at, there = _last(chunks, size)
            m_bc = m_bc + jnp.where(there, jnp.maximum(gather(side.ends, at), _LOWEST), 0.0)
        sides.append((jnp.minimum(m_bc, 0.0), number_bc))
    (t_bc, number_bc), (s_bc, _) = sides
    tau = 1.0 if how.divergence in ("absolute", "limit") else how.tau
    valid_bc = number_bc > 0
    t_bc, s_bc = (jnp.where(valid_bc, m / tau, -1.0) - how.epsilon for m in (t_bc, s_bc))
    each_bc = DIVERGENCES[how.divergence](jax.lax.stop_gradient(t_bc), s_bc)
    return jnp.sum(jnp.where(valid_bc, each_bc, 0.0)), jnp.sum(valid_bc, dtype=jnp.float32)


def latent(
    teacher_btd: jax.Array,
    student_btd: jax.Array,
    chunks: tuple[jax.Array, jax.Array],
    size: int,
    power: int = 2,
    channelwise: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """How far apart final states are where chunks end: the sum over chunks f32 [], and how many there are f32 [].

    Of a chunk it is the mean over channels of the difference to this power (1 or 2), in units of the mean of the
    teacher's states to that power: of each channel, or of all. chunks: as in `Chunked`, teacher's and student's.
    """
    states, valid_bc = [], True
    for x_btd, found in zip((teacher_btd, student_btd), chunks):
        at, there = _last(jnp.where(found < 0, size, found), size)
        states.append(gather(x_btd.astype(jnp.float32), at))
        valid_bc = valid_bc & there
    t_bcd, s_bcd = jax.lax.stop_gradient(states[0]), states[1]
    number = jnp.maximum(jnp.sum(valid_bc, dtype=jnp.float32), 1.0)
    unit_d = jnp.sum(jnp.where(valid_bc[..., None], jnp.abs(t_bcd) ** power, 0.0), axis=(0, 1)) / number
    unit_d = unit_d if channelwise else jnp.mean(unit_d, keepdims=True)
    each_bcd = jnp.abs(t_bcd - s_bcd) ** power / (unit_d[None, None] + 1e-8)
    total = jnp.sum(jnp.where(valid_bc, jnp.mean(each_bcd, axis=-1), 0.0))
    return total, jnp.sum(valid_bc, dtype=jnp.float32)


def scored(side: Chunked, size: int) -> jax.Array:
    """How many chunks have a token that counts, f32 []: those of `loss` where none are merged."""
    counts = (side.counts & (side.chunks >= 0)).at[:, 0].set(False)
    number_bc = segment_sum(counts.astype(jnp.float32), jnp.where(side.chunks < 0, size, side.chunks), size)
    return jnp.sum(number_bc > 0, dtype=jnp.float32)


def _groups(teacher: Chunked, merge: float | None, size: int) -> jax.Array:
    """The group i32 [b, c] of every chunk: its own number, or that of those that it is merged with."""
    own = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (len(teacher.chunks), size))
    if merge is None:
        return own
    at, _ = _last(jnp.where(teacher.chunks < 0, size, teacher.chunks), size)
    closes = jnp.exp(gather(teacher.ends, at)) > merge
    return jnp.cumsum(jnp.pad(closes[:, :-1], ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def _last(chunks_bt: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The place i32 [b, c] of the last token of every chunk, and bool [b, c], whether there is one."""
    numbers = jnp.arange(size, dtype=jnp.int32)
    end = jax.vmap(lambda row: jnp.searchsorted(row, numbers, side="right"))(chunks_bt)
    begin = jax.vmap(lambda row: jnp.searchsorted(row, numbers, side="left"))(chunks_bt)
    return jnp.maximum(end - 1, 0).astype(jnp.int32), end > begin


def factors(lengths: jax.Array) -> jax.Array:
    """What n losses count, f32 [n], whose gradients have these lengths, f32 [n], so that none counts more because it
    is larger ("gradmag" with preserve_mag): inverse lengths that add up to 1; 0 for a loss without a gradient."""
    inverse = jnp.where(lengths > 0, 1 / (lengths + 1e-8), 0.0)
    return inverse / jnp.maximum(jnp.sum(inverse), 1e-30)
