"""Final states of what was read, each with the token that came next: what kNN-LM (`nn.neighbours`) looks up.

As entries do, they depend on the parts in which a text was read; there is one for every token that another follows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dense import bucket
from atom_jax.lasting.codec import half
from atom_jax.lasting.front import pages
from atom_jax.lasting.store import Manifest, Store
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.neighbours import Datastore, Neighbours
from atom_jax.typing import LM, AtomError, Batch


class States(NamedTuple):
    """m states in the order of their texts: x float16 [m, d]; i32 [m] the tokens that follow, and source and place of
    those that they belong to."""

    x: np.ndarray
    following: np.ndarray
    source: np.ndarray
    place: np.ndarray


def check(lm: LM, what: str) -> None:
    """AtomError, which begins with `what`, for a model whose logits mix nothing in."""
    if not isinstance(lm.config, TransformerConfig):
        raise AtomError(f"{what}: knn is for transformers; this is a {lm.family} model")


def arrays(parts_td: Sequence[Any], following_m: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """What a file "state" holds of the states of parts, of which m are followed by these tokens; nothing of none."""
    if not parts_td or not len(following_m):
        return {}
    x = np.concatenate([np.asarray(part, np.float32) for part in parts_td])
    return {"state": {"x": half(x[: len(following_m)], "state"), "following": following_m.astype(np.int32)}}


def load(store: Store, manifest: Manifest) -> States:
    """All states of a memory. AtomError for files that hold others than the manifest names."""
    parts, source, place, wanted = [], [], [], manifest.states
    for text in manifest.sources:
        found = [_read(store, name) for name in text.state]
        if (held := sum(len(following) for _, following in found)) != wanted[text.id]:
            raise AtomError(f"{store.directory}: holds {held} states of {text.name}, and not {wanted[text.id]}")
        parts += found
        source.append(np.full(held, text.id, np.int32))
        place.append(np.arange(held, dtype=np.int32))
    if len({x.shape[1] for x, _ in parts}) > 1:
        raise AtomError(f"{store.directory}: its states have different widths")
    none = np.zeros((0, parts[0][0].shape[1] if parts else 0), np.float16), np.zeros(0, np.int32)
    x, following = (np.concatenate(both) for both in zip(none, *parts))
    return States(x, following, *(np.concatenate([none[1], *what]) for what in (source, place)))


def _read(store: Store, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = store.read(name)
    x, following = (found.get(what) for what in ("x", "following"))
    right = len(found) == 2 and x is not None and following is not None and x.ndim == 2
    if not (right and x.dtype == np.float16 and following.dtype == np.int32 and following.shape == x.shape[:1]):
        raise AtomError(
            f"{store.directory / name}: holds no states, float16 [m, d], with the tokens that follow them"
        )
    return x, following


def datastore(states: States, lm: LM, how: Neighbours) -> Datastore | None:
    """The states on the device, None where there are none. AtomError for others than the model's."""
    cfg = lm.config
    if not len(states.x):
        return None
    if states.x.shape[1] != cfg.d_model or not 0 <= states.following.min() <= states.following.max() < cfg.vocab_size:
        raise AtomError("memory: its states, or the tokens that follow them, are not this model's")
    return Datastore.of(states.x, states.following, how, bucket(len(states.x)))


def looked_at(
    lm: LM, states: States, how: Neighbours, rows: Sequence[np.ndarray], k: int
) -> list[list[tuple[int, int, int, float]]]:
    """Of every prompt, i32 [t], the k pages as of `front.pages`, by the shares of their states in what is mixed in
    after each of its tokens."""
    store, out = datastore(states, lm, how), []
    for row in rows:
        padded = np.zeros((1, bucket(len(row))), np.int32)
        padded[0, : len(row)] = row
        shares = np.asarray(_shares(lm.params, store, padded, len(row), cfg=lm.config))[: len(states.x)]
        out.append(pages(shares[None, None], states.source, states.place, k))
    return out


@functools.partial(jax.jit, static_argnames="cfg")
def _shares(params: Any, store: Datastore, ids_1t: jax.Array, count: jax.Array, *, cfg: Any) -> jax.Array:
    """f32 [m], the shares of states after `count` tokens, added up."""
    at = jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    batch = Batch(ids_1t, at, (at < count).astype(jnp.int32))
    x_1td, _, _ = registry.of(cfg).hidden(params, batch, cfg=cfg)
    share_tn, index_tn = store.find(x_1td[0])
    share_tn = jnp.where((at < count)[0][:, None], share_tn, 0.0)
    return jnp.zeros(len(store.keys), jnp.float32).at[index_tn].add(share_tn)
