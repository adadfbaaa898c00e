"""The records of the published families of transformers."""

from __future__ import annotations

import dataclasses
import functools

from atom_jax.models import transformer, transformer_published, transformer_variants
from atom_jax.models.family import Family, Node
from atom_jax.models.flops import keys, matrices
from atom_jax.models.published import Published
from atom_jax.models.transformer import TransformerConfig


def flops(cfg: TransformerConfig, length: int) -> float:
    """See `Family`."""
    return block_flops(cfg, length) + 2 * cfg.d_model * cfg.vocab_size


def block_flops(cfg: TransformerConfig, length: int) -> float:
    """Of the layers alone."""
    total = 2.0 * matrices(transformer.spec(cfg)["layers"])
    for i in range(cfg.n_layers):
        sliding = cfg.layer_types and cfg.layer_types[i] == "sliding"
        total += 4 * cfg.n_heads * cfg.head_dim * keys(length, cfg.sliding_window if sliding else length)
    return total


def describe(cfg: TransformerConfig) -> list[tuple[str, str]]:
    """See `Family`."""
    tied = "tied" if cfg.tie_embeddings else "separate"
    return [
        ("sizes", sizes(cfg)),
        ("vocabulary", f"{cfg.vocab_size:,}, {tied} output embedding"),
        ("positions", positions(cfg)),
        *memory(cfg),
    ]


def sizes(cfg: TransformerConfig) -> str:
    """Of the layers."""
    heads = f"{cfg.n_heads} query and {cfg.n_kv_heads} key/value heads of {cfg.head_dim}"
    sliding = cfg.layer_types.count("sliding")
    window = f", {sliding} of the layers with a window of {cfg.sliding_window}" if sliding else ""
    return f"{cfg.n_layers} layers, width {cfg.d_model}, MLP {cfg.d_ff}, {heads}{window}"


def positions(cfg: TransformerConfig) -> str:
    """How many there are, and how they are said to attention."""
    scaling = f", {cfg.rope_scaling.kind} scaling by {cfg.rope_scaling.factor:g}" if cfg.rope_scaling else ""
    return f"{cfg.max_length:,}, rotary base {cfg.rope_theta:g}{scaling}"


def memory(cfg: TransformerConfig) -> list[tuple[str, str]]:
    """The line about the policy, where there is one."""
    return [] if cfg.memory is None else [("memory", cfg.memory.describe())]


def _nodes(cfg: TransformerConfig) -> tuple[Node]:
    return (Node((cfg.attentions,), cfg.max_length),)


def _examples(name: str) -> dict[str, TransformerConfig]:
    plain = TransformerConfig(
        family=name, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_length=512, bos_id=256
    )
    found = {"plain": plain, "untied": dataclasses.replace(plain, tie_embeddings=False)}
    if transformer_variants.FAMILIES[name].kinds is not None:
        sliding = ("sliding", "full") * 2
        found["sliding"] = dataclasses.replace(plain, layer_types=sliding, sliding_window=8)
    return found


def _published(name: str) -> Published:
    return Published(
        recognises=lambda data: data.get("model_type") == name,
        from_hf=transformer_published.from_hf,
        to_hf=transformer_published.to_hf,
        rules=transformer_published.rules,
    )


FAMILIES = tuple(
    Family(
        name=name, config=TransformerConfig, spec=transformer.spec, apply=transformer.apply,
        hidden=transformer.hidden, logits=transformer.logits, init_cache=transformer.init_cache,
        nodes=_nodes, step=transformer.step, commit=transformer.commit, decode_params=transformer.decode_params,
        roomier=transformer.roomier, flops=flops, describe=describe, examples=functools.partial(_examples, name),
        published=_published(name),
    )
    for name in transformer_variants.FAMILIES
)  # fmt: skip
