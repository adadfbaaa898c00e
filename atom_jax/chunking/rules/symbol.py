"""Units that end with a symbol in the text, as hierarchical autoregressive transformers end words (Neitemeier et
al., 2025): the tokenizer writes it, and in generation the model does."""

from __future__ import annotations

import dataclasses

from atom_jax import config
from atom_jax.chunking.types import END, Boundary, Seen, Tree, ids_of

KIND = END


@config.register
@dataclasses.dataclass(frozen=True)
class Symbol:
    """Ends a unit at every position that holds the symbol."""

    # The end-of-word symbol of `tokenizers.HatTokenizer`.
    id: int = 259

    def __post_init__(self):
        config.check(self, id=(0, 2**28))


def spec(cfg: Symbol, d: int) -> Tree:
    """No parameters."""
    return {}


def init_state(cfg: Symbol, d: int, b: int) -> tuple[()]:
    """Nothing to remember."""
    return ()


def apply(p: Tree, seen: Seen, state: tuple[()], *, cfg: Symbol) -> tuple[Boundary, tuple[()]]:
    """END marks where the id is the symbol. Raises AtomError in a stage that has no ids."""
    return Boundary((seen.tokens.segments > 0) & (ids_of(seen, "Symbol") == cfg.id)), state
