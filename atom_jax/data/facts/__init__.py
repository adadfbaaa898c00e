"""Facts planted in running text and asked for later in the same document, as a source of training text.

A new kind of facts is one entry of `tables.KINDS`; the evaluation has its own, which must stay apart.
"""

from __future__ import annotations

from atom_jax.data.facts.source import Asking, Facts, parse

__all__ = ["Asking", "Facts", "parse"]
