"""Tokens that are looked at again, long after they were read: a text's own facts, none of them planted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.inference.score import logprobs, to_batch
from atom_jax.kvcache import observe
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.lasting.score import Moments, features, spread
from atom_jax.kvcache.policy import Mode
from atom_jax.lasting import inside
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.terminal import progress
from atom_jax.typing import LM, AtomError, Batch

SINKS = 4


def moments(lm: LM, documents: Sequence[np.ndarray], later: int, least: float, name: str) -> Moments:
    """Of documents, i32 [n] each.

    Wanted are the tokens to which some head pays more than `least` of the attention of a query that stands at least
    `later` tokens behind. What tells of them is what queries paid before that, as the cache policy `shared` with this
    horizon sees it. A document's first tokens (SINKS), and the last ones, behind which no such query stands, don't
    count. Raises AtomError for models other than transformers, and where no token counts or is wanted.
    """
    if not isinstance(lm.config, TransformerConfig):
        raise AtomError(f"later: is for transformers; this is a {lm.family} model")
    rows, wanted = [], []
    with progress(total=sum(map(len, documents)), desc=name, unit="tok", unit_scale=True) as bar:
        for ids in documents:
            if len(ids) > later + SINKS:
                row, far = _document(lm, ids, later)
                rows.append(row)
                wanted.append(far > least)
            bar.update(len(ids))
    if not rows:
        raise AtomError(
            f"{name}: no document has more than {later + SINKS} tokens, behind which a query may look back"
        )
    return Moments.of(np.concatenate(rows, axis=1), np.concatenate(wanted))


def _document(lm: LM, ids: np.ndarray, later: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens that count: `spread` features f32 [f, n], and the largest weight f32 [n] from far behind."""
    n, size = len(ids), bucket(len(ids))
    padded, mask = np.pad(ids, (0, size - n))[None], np.arange(size)[None] < n
    batch, full = to_batch(lm, padded, mask), inside.of(lm.config).full
    most, total, far = (np.asarray(x)[full, 0, :, :n] for x in _seen(lm.params, batch, later, lm.config))
    nll = np.zeros(n + 1, np.float32)
    nll[1:n] = -np.asarray(logprobs(lm, padded, mask))[0, : n - 1]
    x = spread(features(most, total, nll[:n], nll[1:]))
    return x[:, SINKS : n - later], far.max((0, 1))[SINKS : n - later]


@functools.partial(jax.jit, static_argnames=("later", "cfg"))
def _seen(params: Any, batch: Batch, later: int, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f32 [l, b, h, t]: the largest weight and the sum of those from queries fewer than `later` tokens behind, and
    the largest of all others."""

    def probe(p: Any, heads: Any, call: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        pos = jnp.where(call.real, call.tokens.positions, -1)
        pos = jnp.broadcast_to(pos[:, None], call.k.shape[:3])
        paid = functools.partial(observe.received, call.q, call.tokens, call.k, pos, True, None, call.window)
        near = {"after": 1, "within": later}
        return paid(most=True, **near).max(2), paid(**near).sum(2), paid(most=True, after=later).max(2)

    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]
