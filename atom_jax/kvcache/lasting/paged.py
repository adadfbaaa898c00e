"""The memory of a layer whose old entries stay on disk: pages are chosen by their mean keys, and fetched."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.lasting.chosen import ChosenLayer
from atom_jax.nn.attention import NEGATIVE

# By number, what fetches pages: (layer, pages i32 [b, h, p]) -> keys before RoPE and values, float16
# [b, h, p, page, k], zeros behind the entries of short ones. Whoever opened a memory keeps it.
FETCHES: weakref.WeakValueDictionary[int, Callable[[int, np.ndarray], Any]] = weakref.WeakValueDictionary()


@struct.dataclass
class PagedLayer(ChosenLayer):
    """As `ChosenLayer`, with the mean keys of pages [1, h, p, k] for `mem_k`, and nothing, [1, h, 0, k], for `mem_v`.
    A page's weight is that of its mean key in a softmax in which it counts as often as it has entries.

    sizes: i32 [1, p], entries of every page. number: i32 [1], in FETCHES. rank: i32 [1], of the layer among those
    with entries. Rows lean on pages as long as what fetches them is there; without it, or where a page can't be read,
    keys and values are NaN.
    """

    sizes: jax.Array = None
    number: jax.Array = None
    rank: jax.Array = None

    shared: ClassVar[tuple[str, ...]] = (*ChosenLayer.shared, "sizes", "number", "rank")

    def _sizes(self) -> jax.Array:
        return self.sizes[0]

    def _fetched(self, chosen_bhp: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, h, p = chosen_bhp.shape
        size = self.mem_k.shape[-1]
        like = jax.ShapeDtypeStruct((b, h, p, self.policy.page, size), jnp.float16)
        k, v = jax.pure_callback(_fetch, (like, like), self.number[0], self.rank[0], chosen_bhp, like.shape)
        return k.reshape(b, h, -1, size), v.reshape(b, h, -1, size)

    def _seen(self, scores_bhgts: jax.Array) -> jax.Array:
        there = self._sizes()[None, None, None, None]
        return jnp.where(there > 0, scores_bhgts + jnp.log(jnp.maximum(there, 1).astype(jnp.float32)), NEGATIVE)

    def _by_page(self, weight_bhs: jax.Array) -> jax.Array:
        return weight_bhs


def _fetch(number: Any, rank: Any, pages_bhp: Any, shape: Any) -> tuple[np.ndarray, np.ndarray]:
    fetch = FETCHES.get(int(number))
    if fetch is None:
        return (np.full([int(n) for n in shape], np.nan, np.float16),) * 2
    return fetch(int(rank), np.asarray(pages_bhp))
