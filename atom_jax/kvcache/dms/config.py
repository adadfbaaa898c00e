"""The settings of Dynamic Memory Sparsification and its parameters."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from atom_jax import config
from atom_jax.kvcache.policy import Policy
from atom_jax.nn import low_rank
from atom_jax.params import ParamSpec, Tree, ones, zeros
from atom_jax.typing import AtomError

FORMS = ("borrowed", "adapter", "observed", "separators")
# Those whose decision is learned by parameters of its own.
LEARNED = ("adapter", "observed")
# Who decides about a key of a layer.
PER = ("head", "layer", "mean")
# Statistics of `observed`: log of the largest, of the summed and of the recent attention that a key received.
FEATURES = 3


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """How a model decides which keys leave its memory (Łańcucki et al., 2025, "Inference-time hyper-scaling").

    The decision about the key of token i is the sign of a logit computed at token i + 1; a key with a positive one is
    seen by the `window` tokens after its own, and by none later.

    form: "borrowed": the last channel of the first query head of every group is the logit, times scale (the published
        8B checkpoint); "adapter": a projection of the normalised residual stream; "observed": that, plus a linear
        function of the attention that the key received within the window (ours), decided when it leaves the window;
        "separators": what the model is told instead: all keys leave that are neither sinks nor separators, decided at
        their own token (SepLLM, Chen et al., 2024, whose n newest tokens are window = n - 1).
    window: tokens after its own that see every key.
    scale, offset: logit = projection * scale - offset.
    tau: temperature of the relaxed decisions in training.
    per: "head"; "layer": the first head decides for all heads of its layer; or "mean": the mean of their logits does,
        so that a token stays in all heads of a layer or in none (ours).
    bias: the projection has a bias per head.
    beyond: positions from which on the logits change by a learned slope per head with every doubling of the position
        (0: none): what a layer sees of a key drifts along a text, and with it the share of keys that stay (ours).
    shared: channels of evidence about a key (0: none), of the form observed: every layer adds what its heads saw the
        key receive, and every head hears the sum over its own layer and all below. So heads agree about a key that
        few of them have reason to keep by themselves (ours).
    rank: of the corrections to attention's projections (`corrected`); 0: none.
    sinks: positions at the start of a text whose keys are never evicted.
    separators: ids, of the form of that name; (): those of the model's tokenizer.
    page: entries per page of the serving cache.
    cr: the compression ratio that it was trained for; documentation only.
    block_size: page of NVIDIA's own code; kept for export.
    """

    name: ClassVar[str] = "dms"
    forms: ClassVar[tuple[str, ...]] = FORMS
    form: str = "adapter"
    window: int = 512
    scale: float = 100.0
    offset: float = 5.0
    tau: float = 0.1
    per: str = "head"
    bias: bool = False
    beyond: int = 0
    shared: int = 0
    rank: int = 0
    sinks: int = 0
    separators: tuple[int, ...] = ()
    page: int = 32
    cr: float = 8.0
    block_size: int = 256

    def __post_init__(self):
        config.check(self, separators=(0, 2**28), cr=(1, 1e6))
        if self.form not in self.forms:
            raise AtomError(f"memory.form: expected one of {', '.join(self.forms)}, got {self.form!r}")
        if self.per not in PER:
            raise AtomError(f"memory.per: expected one of {', '.join(PER)}, got {self.per!r}")
        if min(self.window, self.page, self.block_size) < 1 or min(self.sinks, self.rank, self.beyond) < 0:
            raise AtomError(
                "memory: window, page and block_size must be at least 1, sinks, rank and beyond at least 0"
            )
        if not 0 <= self.shared <= 64 or (self.shared and self.form != "observed"):
            expected = "expected 0 to 64, and 0 unless the form is observed"
            raise AtomError(f"memory.shared: {expected}; got {self.shared} and {self.form}")
        for name, what in ("rank", "corrections"), ("beyond", "slopes"):
            if self.form not in LEARNED and getattr(self, name):
                raise AtomError(f"memory.{name}: {what} need the form adapter or observed")
        if not self.tau > 0:
            raise AtomError(f"memory.tau: expected a positive temperature, got {self.tau}")

    @property
    def late(self) -> bool:
        """Whether a token decides about the one before it."""
        return self.form not in ("separators", "all")

    def spec(self, projections: Tree) -> Tree:
        """Parameters of one layer whose projections are "q" [d, n, k], "k" [d, h, k] and so on, in the forms that
        have any. Zero weights evict nothing."""
        if self.form not in LEARNED:
            return {}
        d, h, _ = projections["k"].shape
        spec = {
            "norm": ParamSpec((d,), (None,), ones),
            "alpha": ParamSpec((d, h), ("embed", "kv_heads"), zeros),
        }
        if self.bias:
            spec["bias"] = ParamSpec((h,), ("kv_heads",), zeros)
        if self.beyond:
            spec["slope"] = ParamSpec((h,), ("kv_heads",), zeros)
        if self.form == "observed":
            spec["observed"] = ParamSpec((FEATURES, h), (None, "kv_heads"), zeros)
        if self.shared:
            spec["tell"] = ParamSpec((FEATURES + 1, h, self.shared), (None, "kv_heads", None), zeros)
            spec["hear"] = ParamSpec((self.shared, h), (None, "kv_heads"), zeros)
        if self.rank:
            spec |= low_rank.spec(projections, low_rank.ATTENTION, self.rank)
        return spec


def corrected(p: Tree) -> Tree:
    """The parameters of an attention layer with the corrections under "dms" added, and no longer there: with them a
    model learns to read a memory that keys have left. They act wherever keys may be evicted; with eviction off the
    model is what it was, so that one copy of the weights still serves as its own teacher."""
    dms = dict(p["dms"])
    new = {
        name: low_rank.added(p[name], dms.pop(f"{name}_a"), dms.pop(f"{name}_b"))
        for name in low_rank.ATTENTION
        if f"{name}_a" in dms
    }
    return {**p, **new, "dms": dms}
