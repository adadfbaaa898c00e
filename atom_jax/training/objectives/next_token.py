"""The text itself: the next token."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from atom_jax import config
from atom_jax.training import losses
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Setting, register
from atom_jax.typing import Batch


@register
@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the next token, with the model's own losses (`losses.next_token`).

    hard: nothing is drawn while training, so that learned memory decides as it will when the model is used: for
    evictors that are frozen, since hard decisions have no gradient.
    focus: a target that the model gives the probability p counts (1 - p)^focus times (Lin et al., 2017, "Focal Loss",
    equation 4, but with weights that have no gradient): what is known, and what is left to chance, moves the
    parameters less than what is still to be learned. 0: all count alike.
    """

    hard: bool = False
    focus: float = 0.0

    name: ClassVar[str] = "next_token"
    weighs: ClassVar[bool] = True
    z_loss: ClassVar[bool] = True

    def __post_init__(self):
        config.check(self, focus=(0, 100))

    def counts(self, batch: Batch, setting: Setting) -> jax.Array | None:
        """`losses.weight_per_target`, where targets have weights."""
        return None if batch.loss_weights is None else losses.weight_per_target(batch)

    def loss(
        self, params: Any, batch: Batch, key: jax.Array | None, step: Any, *, setting: Setting, counts: Any = None
    ) -> Sums:
        """The model's own losses are means over a part, which count by its targets."""
        return losses.next_token(
            params, batch, None if self.hard else key, cfg=setting.exp.model, lengths=setting.lengths,
            z_loss=setting.exp.optim.z_loss, focus=self.focus, per_target=counts,
        )  # fmt: skip
