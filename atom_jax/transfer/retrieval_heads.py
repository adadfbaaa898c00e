"""Heads that retrieve: those that find again what stood before (Tang et al., 2024, "RazorAttention", section 3)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import block_size
from atom_jax.nn.blockwise import blockwise_lse
from atom_jax.typing import LM, AtomError, Batch

# How often the random tokens are repeated.
REPEATS = 4


def find(
    lm: LM, period: int = 2500, echo: float = 0.01, induction: float = 0.14, seed: int = 0
) -> tuple[tuple[int, int], ...]:
    """(layer, key/value head) of those that retrieve, for `RazorAttention.heads`.

    period: random tokens, which are read four times. echo, induction: shares of all query heads, best by attention to
    the same token earlier, and to the one after it; a key/value head is chosen if one of its group is. Raises
    AtomError for models that are not transformers over tokens.
    """
    cfg = lm.config
    if not isinstance(cfg, TransformerConfig):
        raise AtomError(f"heads that retrieve are looked for in transformers, not in models of family {lm.family}")
    ids = np.tile(np.random.default_rng(seed).integers(0, cfg.vocab_size, period), REPEATS)
    found = np.asarray(_of_model(lm.params, jnp.asarray(ids, jnp.int32)[None], period, cfg=cfg))
    chosen: set[tuple[int, int]] = set()
    for score, share in zip(np.moveaxis(found, 1, 0), (echo, induction)):
        best = np.argsort(-score.ravel(), kind="stable")[: math.ceil(share * score.size)]
        layers, heads, _ = np.unravel_index(best, score.shape)
        chosen |= set(zip(layers.tolist(), heads.tolist()))
    return tuple(sorted(chosen))


@functools.partial(jax.jit, static_argnames=("period", "cfg"))
def _of_model(params: Any, ids_bt: jax.Array, period: int, *, cfg: TransformerConfig) -> jax.Array:
    """`scores` of every layer, [l, 2, h, g]."""
    positions = jnp.broadcast_to(jnp.arange(ids_bt.shape[1])[None], ids_bt.shape)
    batch = Batch(ids_bt, positions, jnp.ones_like(ids_bt))
    probe = lambda p, heads, call: scores(call, period)  # noqa: E731
    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]


def scores(call: Call, period: int) -> jax.Array:
    """f32 [2, h, g]: of tokens that have occurred a period ago, the mean attention to their earlier occurrences, and
    to what followed those."""
    t, size = call.q.shape[3:]
    places = (call.tokens.positions, call.tokens.segments) * 2
    _, lse = blockwise_lse(call.q, call.k, call.v, places, call.window, True, block_size(t))

    def at(first: int, back: int) -> jax.Array:
        """The sum of attention from all tokens from `first` on to the keys so far back."""
        if call.window is not None and back >= call.window:
            return jnp.zeros(call.q.shape[1:3])
        q, k = call.q[..., first:, :], call.k[:, :, None, first - back : t - back]
        score = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1) * size**-0.5
        return jnp.exp(score - lse[..., first:]).sum((0, 3))

    ago = range(period, t, period)
    totals = jnp.stack([sum(at(d, d) for d in ago), sum(at(d, d - 1) for d in ago)])
    return totals / (call.q.shape[0] * (t - period))
