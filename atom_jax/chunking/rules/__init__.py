"""Boundary rules: where a unit ends.

A rule is a registered configuration class and a module, or anything else that has what a module here has: the KIND of
its marks ("start" or "end"), HAS_P = True where its `Boundary.p` is set, and three functions:
`spec(cfg, d)` describes its parameters for states of width d, `init_state(cfg, d, b)` is what it remembers of b
rows before their first position, `apply(p, seen, state, *, cfg)` marks t more positions of every row.

LOOKS_AHEAD = True: a position is decided with a look at the state of the next one. Such a rule remembers nothing; of
the last position of a call it says that no unit ends there, and who reads further has it decide on that one again.
Generation can't wait for the next position, so ids have to say where units end (`models.bolmo`).

FRAMES = True: a rule for frames, whose `Seen.changed` it may look at. FORESEES = True: `apply` is also given
`foresee`, which says from the states f32 [b, t, d] of the positions before how many nats f32 [b, t] it took to
foretell what each position holds.

A rule whose marks depend on positions beyond a document's first has `period(cfg)`: equal remainders of that many
positions are equal to it. One that remembers positions has `nearer(state, by_b, *, cfg)`: its state where every row's
positions, i32 [b], count so many less.

`late(cfg)`: the option because of which the rule has a loss that needs the model's own output, "" without one; then
`late_loss(boundary, entropy_bt, tokens, *, cfg)` is that loss, f32 [], from what `apply` found (but its loss) and the
entropies f32 [b, t], in nats, of the model's distribution of the token after each position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from atom_jax.chunking.rules import change, cosine, entropy, fixed, lookahead, predictor, spaces, surprise, symbol
from atom_jax.chunking.types import Boundary, Seen, Tree
from atom_jax.typing import AtomError

# From the class of a configuration to the rule.
RULES: dict[type, Any] = {
    cosine.Cosine: cosine,
    predictor.Predictor: predictor,
    spaces.Spaces: spaces,
    entropy.Entropy: entropy,
    fixed.Fixed: fixed,
    symbol.Symbol: symbol,
    lookahead.Lookahead: lookahead,
    surprise.Surprise: surprise,
    change.Change: change,
}


def register(cfg: type, rule: Any) -> None:
    """Makes a rule of one's own known under its (registered) configuration class."""
    RULES[cfg] = rule


def of(cfg: Any) -> Any:
    """The rule (spec, init_state, apply) of a configuration. Raises AtomError for anything else."""
    if type(cfg) not in RULES:
        known = ", ".join(c.__name__ for c in RULES)
        raise AtomError(f"rule: expected one of {known}, got {cfg!r}")
    return RULES[type(cfg)]


def looks_ahead(cfg: Any) -> bool:
    """Whether a rule decides on a position with a look at the next one."""
    return getattr(of(cfg), "LOOKS_AHEAD", False)


def late(cfg: Any) -> str:
    """The option because of which a rule's loss needs the model's own output, "" without one."""
    found = getattr(of(cfg), "late", None)
    return "" if found is None else found(cfg)


def for_frames(cfg: Any) -> bool:
    """Whether a rule is for frames alone."""
    return getattr(of(cfg), "FRAMES", False)


def period(cfg: Any) -> int:
    """By how many positions a document may be moved, or a multiple, without a change of its marks."""
    found = getattr(of(cfg), "period", None)
    return 1 if found is None else found(cfg)


def nearer(state: Any, by_b: jax.Array, *, cfg: Any) -> Any:
    """A rule's state where positions count `by_b`, i32 [b], less."""
    found = getattr(of(cfg), "nearer", None)
    return state if found is None else found(state, by_b, cfg=cfg)


def apply(
    p: Tree, seen: Seen, state: Any, *, cfg: Any, foresee: Callable[[jax.Array], jax.Array] | None = None
) -> tuple[Boundary, Any]:
    """What the rule of a configuration marks, and its state; foresee: of the model, for rules that ask for it."""
    rule = of(cfg)
    extra = {"foresee": foresee} if getattr(rule, "FORESEES", False) else {}
    return rule.apply(p, seen, state, cfg=cfg, **extra)
