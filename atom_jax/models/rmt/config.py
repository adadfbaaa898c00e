"""The configuration of a recurrent memory transformer, and the parameters that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax import config
from atom_jax.kvcache.policy import policies_of
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class RMTConfig:
    """A transformer that reads a text segment by segment, and what it hands on from each to the next."""

    family: str = "rmt"
    # The transformer, of any family, with its vocabulary; its own dtype and remat are not used.
    main: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    # Vectors that are handed on; 0: nothing is.
    memory_tokens: int = 16
    # Tokens of a segment.
    segment: int = 512
    # Documents that a row without a cache may hold, so that all of them fit in any case: each begins a segment of its
    # own. What has no room is counted (`aux["lost"]`, the metric lost_tokens), and calls are repeated with more room
    # where they can be, which in training they cannot.
    documents: int = 8
    # Tokens of a text at most.
    max_length: int = 2**20
    dtype: str = "float32"
    # Recompute each segment in the backward pass instead of storing its activations.
    remat: bool = False

    def __post_init__(self):
        config.check(
            self, memory_tokens=(0, 2**16), segment=(1, 2**24), documents=(1, 2**16), max_length=(1, 2**31 - 1)
        )
        if self.main.lora is not None:
            raise AtomError("main.lora is for transformers, and this one is inside of a recurrent memory transformer")
        if (places := self.segment + 2 * self.memory_tokens) > self.main.max_length:
            raise AtomError(
                f"segment: {self.segment} tokens between two times {self.memory_tokens} memory_tokens take {places} "
                f"places, and main.max_length is {self.main.max_length}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")

    @property
    def blocks(self) -> TransformerConfig:
        """The transformer as it is computed here: what is computed again are segments, and not single layers."""
        return dataclasses.replace(self.main, dtype=self.dtype, remat=False, memory=None)

    @property
    def vocab_size(self) -> int:
        """That of the transformer, as the following are."""
        return self.main.vocab_size

    @property
    def tie_embeddings(self) -> bool:
        """Whether the table of embeddings is the head's, too."""
        return self.main.tie_embeddings

    @property
    def bos_id(self) -> int | None:
        """What texts begin with."""
        return self.main.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What texts end with."""
        return self.main.eos_ids

    @property
    def memory(self) -> Any:
        """Cache policies: what is refused, where there are some (`spec`)."""
        return self.main.memory

    @property
    def pad_id(self) -> int | None:
        """What padding is."""
        return self.main.pad_id


def spec(cfg: RMTConfig) -> Tree:
    """ParamSpec tree: "main", the transformer's, and "memory" [m, d], what is read before a text's first segment.

    Raises AtomError for cache policies."""
    for policy in policies_of(cfg.main.memory):
        raise AtomError(
            f"memory: {policy.name} is for layers that see everything before them; "
            "those of a recurrent memory transformer see one segment"
        )
    tree = {"main": transformer.spec(cfg.blocks)}
    if cfg.memory_tokens:
        tree["memory"] = ParamSpec((cfg.memory_tokens, cfg.main.d_model), (None, "embed"), normal(0.02))
    return tree


def roomier(cfg: RMTConfig) -> RMTConfig | None:
    """The same model with room for more documents in a row."""
    return dataclasses.replace(cfg, documents=2 * cfg.documents) if cfg.documents < 2**15 else None
