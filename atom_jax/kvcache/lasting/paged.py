"""The memory of a layer whose old entries stay on disk: pages are chosen by their mean keys, and fetched."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.kvcache.lasting.chosen import ChosenLayer
from atom_jax.kvcache.memory import Memory, layers
from atom_jax.nn.attention import NEGATIVE
from atom_jax.typing import AtomError


class Fetch(Protocol):
    """What fetches pages. failed: why one could not be read, once one could not."""

    failed: AtomError | None

    def __call__(self, layer: int, pages_bhp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys before RoPE and values of pages i32 [b, h, p], float16 [b, h, p, page, k], zeros behind the entries of
        short ones; NaN where one can't be read."""


# By number. The memory on disk keeps its latest one, and sessions those that their rows lean on.
FETCHES: weakref.WeakValueDictionary[int, Fetch] = weakref.WeakValueDictionary()


@struct.dataclass
class FetchedLayer(ChosenLayer):
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

    def _seen(self, scores_hrs: jax.Array) -> jax.Array:
        there = self._sizes()[None, None]
        return jnp.where(there > 0, scores_hrs + jnp.log(jnp.maximum(there, 1).astype(jnp.float32)), NEGATIVE)

    def _compared(self) -> jax.Array:
        return jnp.sum(self.sizes > 0, axis=-1, dtype=jnp.int32)

    def _by_page(self, scores_hrs: jax.Array) -> jax.Array:
        return scores_hrs


def fetches(memory: Memory) -> tuple[Fetch, ...]:
    """What fetches pages for these rows; they are there as long as this is kept. AtomError where it is gone."""
    numbers = {int(np.asarray(x.number).flat[0]) for x in layers(memory) if isinstance(x, FetchedLayer)}
    found = tuple(FETCHES.get(number) for number in numbers)
    if None in found:
        raise AtomError("the rows lean on a lasting memory on disk that was closed, or has changed since, before they"
                        " were read")  # fmt: skip
    return found


def _fetch(number: Any, rank: Any, pages_bhp: Any, shape: Any) -> tuple[np.ndarray, np.ndarray]:
    fetch = FETCHES.get(int(number))
    if fetch is None:
        return (np.full([int(n) for n in shape], np.nan, np.float16),) * 2
    return fetch(int(rank), np.asarray(pages_bhp))
