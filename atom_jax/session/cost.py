"""What the memory of a batch will take, before there is one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from atom_jax import params as params_lib
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.budget import BudgetLayer
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.paged import AHEAD, Level, PagedLayer
from atom_jax.kvcache.pool import coarse
from atom_jax.models import registry
from atom_jax.session.session import LEAST


class Cost:
    """Bytes of the buffers of a model with this configuration (`Session.nbytes`), as a lane of rows has them.

    Buffers whose rows are equally long go by the longest text; pages by what the heads keep of each.
    """

    def __init__(self, cfg: Any):
        self._shapes = functools.cache(lambda n: jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, 1, n)))
        self._paged = [x for x in memory_lib.layers(self._shapes(1)) if isinstance(x, PagedLayer)]

    @property
    def paged(self) -> bool:
        """Whether texts take what is kept of them."""
        return bool(self._paged)

    def expected(self, length: int) -> int:
        """Entries per head to expect of a text of so many tokens, in layers with pages; 0 without such."""
        return max((layer.policy.expected(length) for layer in self._paged), default=0)

    def nbytes(self, rows: int, longest: int, entries: Sequence[float], level: Level | None = None) -> int:
        """Of so many rows, with texts of up to `longest` tokens, of which heads keep so many entries in pages, on
        average; level: has seen how unevenly. None: alike."""
        level = level or Level()
        shapes = self._shapes(bucket(longest, LEAST))
        total = rows * (_nbytes(shapes) - sum(_pools(x) for x in memory_lib.layers(shapes)))
        for x in memory_lib.layers(shapes):
            if isinstance(x, BudgetLayer) and x.policy.prompt_only:
                slots = x.k.shape[-2]
                one = params_lib.nbytes((x.k, x.v, x.pos, x.score, x.bias)) // slots
                total += rows * one * max(bucket(longest, LEAST) - slots, 0)
        for layer in self._paged:
            page, heads = layer.k.shape[-2], layer.pool.n.shape[-1]
            idle = [0.0] * (rows - len(entries))
            pages = coarse(sum(heads * -(-(math.ceil(level.fullest * n) + AHEAD) // page) for n in [*entries, *idle]))
            total += int(_pools(layer) // layer.k.shape[-3] * pages * level.evenness)
        return total


def _nbytes(memory: Memory) -> int:
    return sum(params_lib.nbytes(node.layers) for node in memory_lib.nodes(memory))


def _pools(layer: Any) -> int:
    """Bytes that go with the number of pages."""
    if not isinstance(layer, PagedLayer):
        return 0
    pool = layer.pool
    return params_lib.nbytes((pool.k, pool.v, pool.owner, pool.filled, pool.bias, pool.notes))
