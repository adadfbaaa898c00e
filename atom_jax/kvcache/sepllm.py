"""SepLLM (Chen et al., 2024): the first tokens, the newest ones, and between them what separates parts of a text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache import separators
from atom_jax.kvcache.budget import Budget
from atom_jax.kvcache.layer import Call
from atom_jax.tokenizers import Tokenizer
from atom_jax.typing import AtomError

# Beyond positions, yet small enough that float32 tells the sums apart.
AHEAD = 2.0**22


@config.register
@dataclasses.dataclass(frozen=True)
class SepLLM(Budget):
    """Score: the position; of separators, later than all other positions. So the newest separators stay besides the
    `sinks` first and the `window` newest tokens, and where room is left over, the tokens next to the window.

    separators: ids; (): those of the model's tokenizer (`separators.separators`). Keys keep the positions that they
    were computed at. The form that models are trained with is dms:form=separators.
    """

    name: ClassVar[str] = "sepllm"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"separators": (0, 2**28)}
    sinks: int = 4
    window: int = 256
    separators: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise AtomError(f"memory {self.name}: expected window of at least 1, got {self.window}")

    def fitted(self, tokenizer: Tokenizer) -> SepLLM:
        """With the tokenizer's separators, unless there are some."""
        return self if self.separators else dataclasses.replace(self, separators=separators.separators(tokenizer))

    def recent(self, limit_bh: jax.Array) -> jax.Array:
        """The window, as far as the sinks leave room for it."""
        return jnp.clip(limit_bh - self.sinks, 0, self.window)

    def token_score(self, call: Call) -> jax.Array:
        """The position, of separators with AHEAD."""
        ahead = jnp.where(separators.are(call.ids, self.separators, self.name), AHEAD, 0.0)
        return jnp.broadcast_to((call.tokens.positions + ahead)[:, None], call.k.shape[:3])
