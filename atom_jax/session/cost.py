"""What the memory of a batch will take, before there is one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from atom_jax import params as params_lib
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.paged import Level, in_pages
from atom_jax.models import registry
from atom_jax.session.session import LEAST


class Cost:
    """Bytes of the buffers of a model with this configuration (`Session.nbytes`), as a lane of rows has them.

    Buffers whose rows are equally long go by the longest text; pages by what the heads keep of each.
    """

    def __init__(self, cfg: Any):
        self._shapes = functools.cache(lambda n: jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, 1, n)))
        self._paged = in_pages(self._shapes(1))

    def expected(self, length: int) -> int:
        """Entries per head to expect of a text of so many tokens, in layers with pages; 0 without such."""
        return max((layer.policy.expected(length) for layer in self._paged), default=0)

    def nbytes(self, rows: int, longest: int, entries: Sequence[float], level: Level | None = None) -> int:
        """Of so many rows, with texts of up to `longest` tokens, of which heads keep so many entries in pages, on
        average; level: has seen how unevenly. None: alike."""
        size = bucket(longest, LEAST)
        shapes = self._shapes(size)
        layers = memory_lib.layers(shapes)
        states = memory_lib.nbytes(shapes) - sum(map(params_lib.nbytes, layers))
        entries = [*entries, *[0.0] * (rows - len(entries))]
        pages = sum(layer.page_bytes(entries, level or Level()) for layer in self._paged)
        return rows * (states + sum(layer.row_bytes(size) for layer in layers)) + pages
