"""Dynamic Memory Sparsification as a model meets it: the hooks of `kvcache.policy.Policy`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.kvcache import learned, separators
from atom_jax.kvcache.dms import decide, published, serve
from atom_jax.kvcache.dms.config import Settings, corrected
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policy import Heads, Mode, Seen
from atom_jax.naming import Rule
from atom_jax.params import Tree
from atom_jax.tokenizers import Tokenizer


@config.register
@dataclasses.dataclass(frozen=True)
class DMS(Settings):
    __doc__ = Settings.__doc__

    # The memory is compacted between the parts of a prompt.
    part: ClassVar[int] = 1024
    fields: ClassVar[frozenset[str]] = published.FIELDS
    shrinks: ClassVar[bool] = True

    def fitted(self, tokenizer: Tokenizer) -> DMS:
        """With the tokenizer's separators where they are needed and missing."""
        if self.form != "separators" or self.separators:
            return self
        return dataclasses.replace(self, separators=separators.separators(tokenizer))

    def projections(self, p: Tree, mode: Mode) -> Tree:
        """Corrected wherever keys may be evicted."""
        return corrected(p) if self.rank and mode.kind in ("hard", "relaxed") else p

    def laid_out(self, p: Tree) -> Tree:
        """Corrected once."""
        return super().laid_out(jax.jit(corrected)(p) if self.rank else p)

    def prepare(
        self, heads: Heads, learned: Tree, rotate: Callable[[jax.Array], jax.Array], mode: Mode
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """As in `Policy`, with decision logits f32 [b, h, t]; the borrowed channel leaves the queries."""
        q, h = heads.q_btnk, heads.k_bthk.shape[2]
        z = decide.logits(learned, heads, self)
        if self.form == "borrowed":
            q = decide.lend(rotate(decide.lend(q, h, mode.fade)), h, mode.fade)
        else:
            q = rotate(q)
        return q, rotate(heads.k_bthk), heads.v_bthk, z

    def evidence(self, b: int, t: int) -> jax.Array | None:
        """`shared` channels: where there is no memory, about the keys of the t tokens; else, for every one of these,
        about the key that leaves the window as it is read."""
        return jnp.zeros((b, t, self.shared)) if self.shared else None

    def mode(self, key: jax.Array, layers: int, b: int, h: int, t: int) -> Mode:
        """Relaxed, with logistic noise, where a token decides about another."""
        if not self.late:
            return Mode()
        return Mode("relaxed", learned.logistic(key, (layers, b, h, t)))

    def train(self, call: Call) -> Seen:
        """Reports `evict`, bool [b, h, t] (by the key), `evict_soft`, f32 of that shape (`Decisions.soft`),
        `evict_logits` and `occupancy`, i32 [b, h]."""
        chosen = decide.decide(
            call.learned, call.said, call.q, call.k, call.tokens, self, call.mode, call.evidence
        )  # fmt: skip
        aux = {
            "evict": chosen.evict,
            "evict_soft": chosen.soft,
            "evict_logits": chosen.z,
            "occupancy": decide.occupancy(chosen.evict, call.tokens, self.window),
        }
        return Seen(call.k, call.v, chosen.keep, self.window, aux=aux, evidence=chosen.evidence)

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> serve.DMSLayer:
        """An empty paged cache."""
        return serve.init(self, sizes, capacity, len(numbers))

    def expected(self, length: int) -> int:
        """One key in `cr`, besides those in the window."""
        return min(length, math.ceil(length / self.cr) + self.window)

    def describe(self) -> str:
        """What was learned, and for what."""
        parts = {
            f"shared by {self.shared} channels": self.shared,
            f"slopes beyond {self.beyond:,}": self.beyond,
            f"corrections of rank {self.rank}": self.rank,
        }
        more = "".join(f", {name}" for name, there in parts.items() if there)
        made = f"made for compression by {self.cr:g}"
        return f"learned evictors, form {self.form}, window {self.window}{more}, {made}"

    def rules(self) -> tuple[Rule, ...]:
        """Those of the published evictors, and our own."""
        return published.RULES

    def to_hf(self, family: str) -> dict[str, Any]:
        """Learned evictors are part of a model."""
        return published.to_hf(family, self)

    @classmethod
    def from_hf(cls, fields: Fields) -> DMS | None:
        """See `published.from_hf`."""
        found = published.from_hf(fields)
        return None if found is None else cls(**found)
