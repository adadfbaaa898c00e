"""Dynamic Memory Compression as a model meets it: the hooks of `kvcache.policy.Policy`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.kvcache import learned as learned_lib
from atom_jax.kvcache.dmc import decide, published, serve
from atom_jax.kvcache.dmc.config import Settings
from atom_jax.kvcache.dmc.pooling import pooled
from atom_jax.kvcache.dms import observed
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policy import Heads, Mode, Seen
from atom_jax.naming import Rule
from atom_jax.nn.self_attention import Newest
from atom_jax.params import Tree


@config.register
@dataclasses.dataclass(frozen=True)
class DMC(Settings):
    __doc__ = Settings.__doc__

    # The memory is compacted between the parts of a prompt.
    part: ClassVar[int] = 1024
    fields: ClassVar[frozenset[str]] = published.FIELDS
    shrinks: ClassVar[bool] = True

    def prepare(
        self, heads: Heads, learned: Tree, rotate: Callable[[jax.Array], jax.Array], mode: Mode
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """As in `Policy`, with `decide.Said`; the borrowed channels leave queries and keys."""
        q, k = (decide.lend(rotate(decide.lend(x, self, mode.fade)), self, mode.fade)
                for x in (heads.q_btnk, heads.k_bthk))  # fmt: skip
        return q, k, heads.v_bthk, decide.say(learned, heads, self)

    def mode(self, key: jax.Array, layers: int, b: int, h: int, t: int) -> Mode:
        """Relaxed, with logistic noise."""
        return Mode("relaxed", learned_lib.logistic(key, (layers, b, h, t)))

    def train(self, call: Call) -> Seen:
        """Reports `evict`, bool [b, h, t] (whether the entry of the token goes into the next one's), `evict_soft`,
        f32 of that shape (`Decisions.soft`), `evict_logits` and `occupancy`, i32 [b, h]."""
        mode, k, v, bias, newest = call.mode, call.k, call.v, None, None
        stats = None
        if self.form == "observed":
            received = observed.received(call.q, call.k, call.tokens, call.tokens, self.window - 1)
            stats = jax.lax.stop_gradient(jnp.stack(received, axis=-1))
        call = call.replace(said=decide.observed(call.said, stats, call.learned, self))
        chosen = decide.decide(call.said, call.tokens, self, mode)
        if merging := mode.kind in ("hard", "relaxed"):
            entries = pooled(serve.tokens(chosen.p, chosen.w, call, self), self.span)
            k, v, bias = serve.seen(entries, call, self)
            newest = Newest(call.k, call.v, self.window) if self.window else None
        left = (call.tokens.left < self.window)[:, None]
        aux = {
            "evict": learned_lib.shift(chosen.merges, False),
            "evict_soft": chosen.soft,
            "evict_logits": call.said.leaves,
            "occupancy": jnp.sum(call.real[:, None] & (~chosen.merges | left), axis=2, dtype=jnp.int32),
        }
        keep_window = 0 if merging else max(self.window - 1, 0)
        return Seen(k, v, chosen.keep, keep_window, bias, newest, aux)

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> serve.DMCLayer:
        """An empty paged cache."""
        return serve.init(self, sizes, capacity, len(numbers))

    def expected(self, length: int) -> int:
        """One entry for `cr` tokens, besides the newest."""
        return min(length, math.ceil(length / self.cr) + self.window)

    def describe(self) -> str:
        """What was learned, and for what."""
        mass = (" with their mass" if self.mass else "") + (", or eviction" if self.evicts else "")
        late = f", window {self.window}" if self.window else ""
        return f"learned merging of tokens{mass}, form {self.form}{late}, made for compression by {self.cr:g}"

    def rules(self) -> tuple[Rule, ...]:
        """Our own names."""
        return published.RULES

    def to_hf(self, family: str) -> dict[str, Any]:
        """What a model has learned to merge is part of it."""
        return published.to_hf(self)

    @classmethod
    def from_hf(cls, fields: Fields) -> DMC | None:
        """See `published.from_hf`."""
        found = published.from_hf(fields)
        return None if found is None else cls(**found)
