"""The settings of Dynamic Memory Compression and its parameters."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from atom_jax import config
from atom_jax.kvcache.dms.config import FEATURES
from atom_jax.kvcache.policy import Policy
from atom_jax.params import ParamSpec, Tree, ones, zeros
from atom_jax.typing import AtomError

FORMS = ("borrowed", "adapter", "observed")


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """How a model decides which tokens share an entry of its memory (Nawrot et al., 2024, "Dynamic memory
    compression").

    Where the logit of a token is positive, the token is merged into the entry of the token before it, else it opens
    one. An entry is the mean of its tokens' keys before RoPE and of their values, by the weights that the tokens are
    given, and stands where its newest token stands.

    form: "borrowed": the last channel of a key, less `offset`, is the logit, and the logistic function of that of the
        group's queries on average, plus `offset`, the weight (the published models); "adapter" (ours): both are
        projections of the normalised residual stream, of which the weight's is a logarithm; "observed" (ours): these,
        each plus a linear function of the attention that the token received while it was among the newest.
    window: the newest tokens, so many with the one that reads, stand for themselves: a token joins an entry, or opens
        one, when it is no longer one of them (ours). 0: at once, so that its own query sees what became of it.
    span: an entry is the mean of its last `span` tokens (12 in the published models); 0: of all.
    turned: means are those of keys after RoPE, each where its token stands (ours).
    mass: an entry is attended to like the tokens that it stands for, were they alike: the entropy of their weights,
        the logarithm of their number where they weigh the same, is added to its scores (ours; Bolya et al., 2023,
        "Token merging", add the logarithm in vision).
    evicts: a token may also leave without joining, and the entry before it stays as it is: where the logit of that, a
        projection of its own, is positive and larger than that of merging (ours).
    scale, offset: logit = projection * scale - offset, of the adapter.
    tau: temperature of the relaxed decisions in training.
    bias: the decision has a bias per head (a factor on all weights of a head would change no mean).
    sinks: positions at the start of a text that keep an entry of their own.
    page: entries per page of the serving cache.
    cr: the compression ratio that it was trained for; documentation only.
    """

    name: ClassVar[str] = "dmc"
    form: str = "adapter"
    window: int = 0
    span: int = 0
    turned: bool = False
    mass: bool = False
    evicts: bool = False
    scale: float = 100.0
    offset: float = 5.0
    tau: float = 0.1
    bias: bool = False
    sinks: int = 0
    page: int = 32
    cr: float = 4.0

    def __post_init__(self):
        config.check(self, span=(0, 4096), window=(0, 2**20), cr=(1, 1e6))
        if self.form not in FORMS:
            raise AtomError(f"memory.form: expected one of {', '.join(FORMS)}, got {self.form!r}")
        if self.page < 1 or self.sinks < 0:
            raise AtomError(f"memory: page must be at least 1 and sinks at least 0, got {self.page} and {self.sinks}")
        if not self.tau > 0:
            raise AtomError(f"memory.tau: expected a positive temperature, got {self.tau}")
        if self.form == "borrowed" and self.bias:
            raise AtomError("memory.bias: the form borrowed has no projections")
        if self.evicts and (self.form == "borrowed" or self.span or not self.turned):
            raise AtomError("memory.evicts: expected projections, no span, and turned=true")
        if self.form == "observed" and self.window < 2:
            raise AtomError(f"memory.window: the form observed needs at least 2, got {self.window}")

    def spec(self, projections: Tree) -> Tree:
        """Parameters of one layer whose projections are "q" [d, n, k], "k" [d, h, k] and so on, in the form that has
        any. Zero weights merge nothing."""
        if self.form == "borrowed":
            return {}
        d, h, _ = projections["k"].shape
        matrix = ParamSpec((d, h), ("embed", "kv_heads"), zeros)
        spec = {"norm": ParamSpec((d,), (None,), ones)}
        spec |= dict.fromkeys(self.predicted, matrix)
        if self.form == "observed":
            seen = ParamSpec((FEATURES, h), (None, "kv_heads"), zeros)
            spec |= {f"{name}_observed": seen for name in self.predicted}
        if self.bias:
            spec |= dict.fromkeys(self.biases, ParamSpec((h,), ("kv_heads",), zeros))
        return spec

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the projections: the logit of merging, the logarithm of the weight, the logit of eviction."""
        return ("alpha", "weight", *(["evict"] if self.evicts else []))

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases of the logits, where they have any."""
        return ("bias", *(["evict_bias"] if self.evicts else []))
