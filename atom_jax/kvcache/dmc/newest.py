"""The newest tokens of every row, which stand for themselves and do not share entries yet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache.dmc import decide
from atom_jax.kvcache.dmc.config import Settings
from atom_jax.kvcache.dms.config import FEATURES
from atom_jax.kvcache.dms.observed import received
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.nn.attention import NEGATIVE, Tokens, block_size
from atom_jax.nn.blockwise import blockwise_lse


@struct.dataclass
class Newest:
    """The last n = `window` tokens of every row, the oldest first; of shorter rows the first places mean nothing.

    k, v: [b, h, n, k], keys turned by RoPE. plain: [b, h, n, k], keys before it, or None where means are those of
    turned keys. said: what the tokens say of themselves. stats: f32 [b, h, n, 3], the attention that they received so
    far (form observed), or None.
    """

    k: jax.Array
    v: jax.Array
    plain: Any
    said: decide.Said
    stats: Any

    @classmethod
    def empty(cls, cfg: Settings, sizes: Sizes) -> Newest:
        """Of rows without tokens."""
        shape = (sizes.b, sizes.h, cfg.window)
        k = jnp.zeros((*shape, sizes.k), sizes.dtype)
        no = jnp.zeros(shape, jnp.float32)
        stats = jnp.zeros((*shape, FEATURES), jnp.float32) if cfg.form == "observed" else None
        return cls(k, k, None if cfg.turned else k, decide.Said(no, no, no if cfg.evicts else None), stats)

    def extend(self, call: Call, cfg: Settings) -> tuple[Call, Newest, tuple[jax.Array, jax.Array]]:
        """What happens when t new tokens are read: a call with the t tokens that are no longer among the newest as
        each of them is (those that do not exist, or not yet, are padding), the newest tokens then, and the outputs
        [b, h, g, t, k] and log-sum-exps [b, h, g, t] of the new tokens over the newest ones, their own included."""
        n, t, length, real = self.k.shape[2], call.q.shape[3], call.length[:, None], call.real
        plain = None if self.plain is None else call.k_plain
        new = Newest(call.k, call.v, plain, call.said, None if self.stats is None else self.stats[:, :, :0])
        join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2)  # noqa: E731
        every = jax.tree.map(join, self.replace(stats=None), new.replace(stats=None))
        positions = length - n + jnp.arange(n + t)[None]
        there = jnp.concatenate([positions[:, :n] >= 0, real], axis=1)
        places = Tokens(positions, jnp.where(there, 1, -1))
        queries = Tokens(positions[:, n:], real.astype(jnp.int32))
        if self.stats is not None:
            seen = jnp.stack(received(call.q, every.k, queries, places, n - 1), axis=-1)
            before = jnp.pad(self.stats, [(0, 0), (0, 0), (0, t), (0, 0)])
            top = jnp.maximum(seen[..., :1], before[..., :1])
            every = every.replace(stats=jnp.concatenate([top, seen[..., 1:] + before[..., 1:]], axis=-1))
        old = jax.tree.map(lambda x: x[:, :, :t], every)
        left = real & (positions[:, :t] >= 0)
        leaving = call.replace(
            k=old.k, v=old.v, k_plain=old.plain, said=decide.observed(old.said, old.stats, call.learned, cfg),
            tokens=Tokens(positions[:, :t], left.astype(jnp.int32)),
        )  # fmt: skip
        at = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(n)[None]
        take = lambda x: jnp.take_along_axis(x, at.reshape(-1, 1, n, *[1] * (x.ndim - 3)), axis=2)  # noqa: E731
        return leaving, jax.tree.map(take, every), _attend(call.q, every.k, every.v, queries, places, n)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, places: Tokens, n: int
) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exps of t queries over the n keys up to their own; query i stands at key n + i."""
    t = q.shape[3]
    if t > 1:
        where = (queries.positions, queries.segments, places.positions, places.segments)
        return blockwise_lse(q, k, v, where, n, True, block_size(t, len(q)), start=jnp.int32(n))
    scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = ((places.segments > 0) & (jnp.arange(n + 1) > 0)[None])[:, None, None, None]
    scores = jnp.where(jnp.broadcast_to(seen, scores.shape), scores, NEGATIVE)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
    return jnp.einsum("bhgts,bhsk->bhgtk", weights, v, preferred_element_type=jnp.float32), lse
