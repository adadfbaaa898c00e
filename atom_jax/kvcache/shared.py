"""Facts need their tokens everywhere at once: a choice that all layers and heads share (ours)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.kvcache import observe
from atom_jax.kvcache.budget import Budget, BudgetLayer, Entries, keep_largest
from atom_jax.kvcache.lasting.score import LEAST_MOST, LEAST_TOTAL, middle, spread
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.naming import Rule
from atom_jax.params import ParamSpec, Tree, zeros

_FIELDS = ("budget", "ratio", "sinks", "window", "horizon")


@config.register
@dataclasses.dataclass(frozen=True)
class Shared(Budget):
    """A token stays in all layers and heads, or in none. Score: the largest attention that a later query paid to it
    (any query of the group), averaged over the heads of the layers that find again what was read
    (`lasting.score.middle`): the score "observed" of lasting memories. Of a prompt the tokens stay that have the
    largest; then every token takes the place of the one that has the least, as things stand.

    learned: the score is a linear function of what every layer and head was seen to pay to the token, the logarithms
        of the largest weight and of the sum of all, fitted to facts (`fit_memory --policy_out`), and averaged over
        neighbours (`lasting.score.spread`).
    horizon: only queries fewer than so many tokens behind it count, so that early tokens have no better chances than
        late ones.
    window: the newest tokens, which stay. The whole prompt is held while it is read.
    """

    name: ClassVar[str] = "shared"
    shrinks: ClassVar[bool] = True
    fields: ClassVar[frozenset[str]] = frozenset(f"atom_shared_{name}" for name in _FIELDS)
    sinks: int = 4
    window: int = 64
    horizon: int = 768
    learned: bool = False

    def __post_init__(self):
        super().__post_init__()
        config.check(self, window=(0, 2**24), horizon=(2, 2**30))

    def slots(self, sizes: Sizes, capacity: int) -> int:
        """Everything, until it is settled what stays."""
        return capacity

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """The window."""
        return jnp.full_like(limit_bh, self.window)

    def spec(self, projections: Tree) -> Tree:
        """Weights "most" and "total" [h] of the learned score."""
        weight = ParamSpec((projections["k"].shape[1],), ("kv_heads",), zeros)
        return {"most": weight, "total": weight} if self.learned else {}

    def blank(self, *shape: int) -> dict[str, jax.Array]:
        """The largest weight that an entry received, "most"; of the learned score also the sum of all, "total", and
        what the head says of it, "said"."""
        return {name: jnp.zeros(shape) for name in (("most", "total", "said") if self.learned else ("most",))}

    def noted(self, entries: Entries, call: Call) -> dict[str, jax.Array]:
        """With what several new queries pay."""

        def received(most: bool) -> jax.Array:
            return observe.received(
                call.q, call.tokens, entries.k, entries.pos, call.fresh, None, call.window, most=most, after=1,
                within=self.horizon,
            )  # fmt: skip

        total = received(False).sum(2) if self.learned else None
        return self._with(entries.notes, received(True).max(2), total, call)

    def noted_one(self, layer: BudgetLayer, weights_bhgc: jax.Array, call: Call) -> dict[str, jax.Array]:
        """With what one new query pays."""
        behind = call.tokens.positions[..., None] - layer.pos
        counts = (layer.pos >= 0) & (behind > 0) & (behind < self.horizon)
        paid = jnp.where(jnp.broadcast_to(counts[:, :, None], weights_bhgc.shape), weights_bhgc, 0.0)
        return self._with(layer.notes, paid.max(2), paid.sum(2), call)

    def _with(
        self, notes: dict[str, jax.Array], most: jax.Array, total: jax.Array | None, call: Call
    ) -> dict[str, jax.Array]:
        most = jnp.maximum(notes["most"], most)
        if not self.learned:
            return {"most": most}
        total = notes["total"] + total
        weights = (call.learned[name].astype(jnp.float32)[None, :, None] for name in ("most", "total"))
        said = sum(w * x for w, x in zip(weights, (jnp.log(most + LEAST_MOST), jnp.log(total + LEAST_TOTAL))))
        return {"most": most, "total": total, "said": said}

    def choose(self, entries: Entries, length_b: jax.Array, limit_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Everything, so far."""
        return entries.pos >= 0, limit_bh

    def tells(self, layer: BudgetLayer) -> jax.Array:
        """What its heads say together."""
        return layer.notes["said"].sum(1) if self.learned else layer.notes["most"].mean(1)

    def hears(self, layer: BudgetLayer, told_lbc: jax.Array) -> BudgetLayer:
        """One score for all layers and heads."""
        if self.learned:
            score = spread(told_lbc.sum(0), layer.pos[:, 0])
        else:
            score = told_lbc[middle(len(told_lbc))].mean(0)
        return layer.replace(score=jnp.broadcast_to(score[:, None], layer.pos.shape))

    def settle(self, layers: BudgetLayer, length_b: jax.Array) -> BudgetLayer:
        """All layers and heads keep the tokens of largest score."""
        agreed = lambda layers: jax.vmap(self.hears, in_axes=(0, None))(layers, jax.vmap(self.tells)(layers))  # noqa: E731
        layers = agreed(layers)
        limit_b = self.share(length_b, layers.pos.shape[3]) if self.ratio else jnp.full_like(length_b, self.budget)
        limit = jnp.broadcast_to(limit_b[:, None], layers.pos.shape[1:3])

        def of(layer: BudgetLayer) -> BudgetLayer:
            score = self.guarded(layer.entries, length_b - 1, limit)
            return layer._put(layer.entries, keep_largest(score, self.order(layer.pos), limit, self.digits))

        return agreed(jax.vmap(of)(layers)).replace(
            limit=jnp.broadcast_to(self.later(limit)[None], layers.limit.shape)
        )

    def describe(self) -> str:
        """How many, and by what."""
        many = f"{self.budget} entries" if self.budget else f"{self.ratio:g} of the prompt"
        return f"{many} that all layers and heads share{', by a learned score' if self.learned else ''}"

    def rules(self) -> tuple[Rule, ...]:
        """Our own names."""
        return (Rule("shared_most", "most"), Rule("shared_total", "total")) if self.learned else ()

    def to_hf(self, family: str) -> dict[str, Any]:
        """What is learned is part of a model."""
        return {f"atom_shared_{name}": getattr(self, name) for name in _FIELDS} if self.learned else {}

    @classmethod
    def from_hf(cls, fields: Fields) -> Shared | None:
        """The learned form, where its fields are there."""
        if all(fields.data.get(f"atom_shared_{name}") is None for name in _FIELDS):
            return None
        return cls(
            budget=fields.size("atom_shared_budget", 0, least=0),
            ratio=fields.number("atom_shared_ratio", 0.0, positive=False),
            sinks=fields.size("atom_shared_sinks", cls.sinks, least=0),
            window=fields.size("atom_shared_window", cls.window, least=0),
            horizon=fields.size("atom_shared_horizon", cls.horizon, least=2), learned=True,
        )  # fmt: skip
