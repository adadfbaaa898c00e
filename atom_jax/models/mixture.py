"""Two transformers with one vocabulary that read the same text, and whose next tokens are mixed (Memory Decoder, Cao
et al., 2025: the second one is small and knows what a datastore of kNN-LM knew).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config, tokenizers
from atom_jax.kvcache.memory import Memory
from atom_jax.models import transformer, transformer_family
from atom_jax.models.family import Family, Node
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import neighbours
from atom_jax.params import Tree
from atom_jax.typing import LM, AtomError, Batch, Output

# The two models, in the order of their layers in a memory.
PARTS = ("model", "decoder")


@config.register
@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A model, and a decoder that has `weight` of the next token's law, with its logits divided by `temperature`.
    weight 0 leaves the model as it is. dtype, remat: of both."""

    family: str = "mixture"
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    decoder: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    weight: float = 0.25
    temperature: float = 1.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        config.check(self, weight=(0, 1), temperature=(1e-6, 1e6))
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if self.model.vocab_size != self.decoder.vocab_size:
            raise AtomError(
                f"decoder: it has {self.decoder.vocab_size} ids, the model that it is mixed with"
                f" {self.model.vocab_size}"
            )
        if self.model.memory != self.decoder.memory:
            raise AtomError("decoder.memory: both models have one cache policy, and these differ")

    @functools.cached_property
    def parts(self) -> tuple[TransformerConfig, TransformerConfig]:
        """The two as they are computed here."""
        both = self.model, self.decoder
        return tuple(dataclasses.replace(one, dtype=self.dtype, remat=self.remat) for one in both)

    @property
    def vocab_size(self) -> int:
        """Ids of both."""
        return self.model.vocab_size

    @property
    def d_model(self) -> int:
        """Of final states: those of both, one after the other."""
        return self.model.d_model + self.decoder.d_model

    @property
    def max_length(self) -> int:
        """Positions that both have."""
        return min(self.model.max_length, self.decoder.max_length)

    @property
    def bos_id(self) -> int | None:
        """The model's, as all special ids are."""
        return self.model.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `bos_id`."""
        return self.model.eos_ids

    @property
    def pad_id(self) -> int | None:
        """See `bos_id`."""
        return self.model.pad_id

    @property
    def tie_embeddings(self) -> bool:
        """Whether the model's output matrix is that of its input."""
        return self.model.tie_embeddings


def of(lm: LM, decoder: LM, weight: float = 0.25, temperature: float = 1.0) -> LM:
    """A model and a decoder as one, which writes, scores, serves and is saved as any other. Both have the same
    tokenizer; cache policies are the model's. AtomError for models that don't go together."""
    for one in (lm, decoder):
        if type(one.config) is not TransformerConfig:
            raise AtomError(f"mixture: is of two transformers, and this is a {one.family}")
    if lm.tokenizer is not None and decoder.tokenizer is not None and not tokenizers.same(
        lm.tokenizer, decoder.tokenizer
    ):  # fmt: skip
        raise AtomError("mixture: the ids of the two tokenizers stand for other texts")
    if lm.config.memory is not None or decoder.config.memory is not None:
        raise AtomError("mixture: is made of models without a cache policy, and then given one")
    cfg = MixtureConfig(
        model=lm.config, decoder=decoder.config, weight=weight, temperature=temperature, dtype=lm.config.dtype
    )
    return LM(cfg, dict(zip(PARTS, (lm.params, decoder.params))), lm.tokenizer)


def spec(cfg: MixtureConfig) -> Tree:
    """ParamSpec tree: those of the two, under "model" and "decoder"."""
    return {name: transformer.spec(one) for name, one in zip(PARTS, cfg.parts)}


def init_cache(cfg: MixtureConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """The model's node, with the decoder's beside it: the policies of each decide about its own layers."""
    own, other = (transformer.init_cache(one, batch_size, capacity, dtype) for one in cfg.parts)
    return own.replace(parts=other)


def apply(p: Tree, batch: Batch, *, cfg: MixtureConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """As of `transformer.apply`; logits are log-probabilities of the mixture."""
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def hidden(
    p: Tree, batch: Batch, *, cfg: MixtureConfig, cache: Memory | None = None, **options: Any
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """As of `transformer.hidden`: final states [b, t, d] of both, one after the other; what is reported is the
    model's."""
    found = [
        transformer.hidden(p[name], batch, cfg=one, cache=own, **options)
        for name, one, own in zip(PARTS, cfg.parts, _apart(cache))
    ]
    states, caches, seen = zip(*found)
    if cache is None:
        caches = None
    elif not options.get("tentative"):
        caches = _joined(*caches)
    return jnp.concatenate(states, axis=-1), caches, seen[0]


def logits(p: Tree, x_btd: jax.Array, *, cfg: MixtureConfig) -> jax.Array:
    """Log-probabilities float32 [b, t, v]: log((1 - weight) softmax(model) + weight softmax(decoder / temperature)),
    and of the mixture of these with remembered states beside the parameters (`nn.neighbours`)."""
    states = jnp.split(x_btd, [cfg.model.d_model], axis=-1)
    own, other = (transformer.logits(p[name], x, cfg=one) for name, one, x in zip(PARTS, cfg.parts, states))
    said = (jax.nn.log_softmax(own, axis=-1), jax.nn.log_softmax(other / cfg.temperature, axis=-1))
    out = neighbours.blended(*said, cfg.weight)
    return neighbours.mixed(out, x_btd, p[neighbours.NAME]) if neighbours.NAME in p else out


def step(p: Tree, batch: Batch, *, cfg: MixtureConfig, cache: Memory) -> tuple[jax.Array, Memory, jax.Array]:
    """As of `transformer.step`."""
    x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
    return x_b1d, cache, batch.segments[:, 0] > 0


def commit(cache: Memory, pending: Any, count_b: jax.Array) -> Memory:
    """As of `transformer.commit`."""
    return _joined(*(transformer.commit(own, one, count_b) for own, one in zip(_apart(cache), pending)))


def decode_params(p: Tree, cfg: MixtureConfig, unroll: bool) -> Tree:
    """As of `transformer.decode_params`."""
    return {**p, **{n: transformer.decode_params(p[n], one, unroll) for n, one in zip(PARTS, cfg.parts)}}


def _apart(cache: Memory | None) -> tuple[Memory | None, Memory | None]:
    return (None, None) if cache is None else (cache.replace(parts=()), cache.parts)


def _joined(own: Memory, other: Memory) -> Memory:
    return own.replace(parts=other)


def _nodes(cfg: MixtureConfig) -> tuple[Node, Node]:
    return tuple(Node((one.attentions,), one.max_length) for one in cfg.parts)


def _flops(cfg: MixtureConfig, length: int) -> float:
    return sum(transformer_family.flops(one, length) for one in cfg.parts)


def _describe(cfg: MixtureConfig) -> list[tuple[str, str]]:
    warm = "" if cfg.temperature == 1 else f" at temperature {cfg.temperature:g}"
    said = [f"{one.family}, {transformer_family.sizes(one)}" for one in cfg.parts]
    return [
        ("model", said[0]),
        ("decoder", f"{said[1]}; {cfg.weight:g} of the mixture{warm}"),
        ("vocabulary", f"{cfg.vocab_size:,}"),
        ("positions", f"{cfg.max_length:,}"),
        *transformer_family.memory(cfg.model),
    ]


def _examples() -> dict[str, MixtureConfig]:
    plain = TransformerConfig(
        family="qwen3", d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_length=512,
        bos_id=256,
    )  # fmt: skip
    small = dataclasses.replace(plain, family="llama", d_model=24, n_layers=3, n_kv_heads=4, tie_embeddings=False)
    return {"mixture": MixtureConfig(model=plain, decoder=small)}


def _with_memory(cfg: MixtureConfig, memory: Any) -> MixtureConfig:
    both = {name: dataclasses.replace(getattr(cfg, name), memory=memory) for name in PARTS}
    return dataclasses.replace(cfg, **both)


FAMILY = Family(
    name="mixture", config=MixtureConfig, spec=spec, apply=apply, hidden=hidden, logits=logits,
    init_cache=init_cache, nodes=_nodes, step=step, commit=commit, decode_params=decode_params,
    roomier=lambda cfg: None, flops=_flops, describe=_describe, examples=_examples,
    memory=lambda cfg: cfg.model.memory, with_memory=_with_memory,
)  # fmt: skip
