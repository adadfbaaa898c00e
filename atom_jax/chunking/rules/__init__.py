"""Boundary rules: where a unit ends.

Every module here has a registered configuration class, the KIND of its marks ("start" or "end"), HAS_P = True where
its `Boundary.p` is set, and three functions:
`spec(cfg, d)` describes its parameters for states of width d, `init_state(cfg, d, b)` is what it remembers of b
rows before their first position, `apply(p, seen, state, *, cfg)` marks t more positions of every row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from atom_jax.chunking.rules import cosine, entropy, fixed, predictor, spaces, symbol
from atom_jax.typing import AtomError

RULES: dict[type, ModuleType] = {
    cosine.Cosine: cosine,
    predictor.Predictor: predictor,
    spaces.Spaces: spaces,
    entropy.Entropy: entropy,
    fixed.Fixed: fixed,
    symbol.Symbol: symbol,
}


def of(cfg: Any) -> ModuleType:
    """The module (spec, init_state, apply) of a rule's configuration. Raises AtomError for anything else."""
    if type(cfg) not in RULES:
        known = ", ".join(c.__name__ for c in RULES)
        raise AtomError(f"rule: expected one of {known}, got {cfg!r}")
    return RULES[type(cfg)]
