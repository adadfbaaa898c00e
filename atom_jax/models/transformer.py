"""Decoder-only transformers: Llama, Qwen3, OLMo 2 and OLMo 3 as pure functions over scanned layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config, params
from atom_jax.kvcache import policies, readings
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.kvcache.policy import Mode, policy_of
from atom_jax.models import attention, layers, lora
from atom_jax.models.attention import Attention, Context, Probe
from atom_jax.models.lora import LoRA
from atom_jax.models.transformer_variants import FAMILIES
from atom_jax.nn import neighbours, rope
from atom_jax.nn.attention import Tokens, attention_spec
from atom_jax.nn.embedding import SMALL_VOCAB, lookup
from atom_jax.nn.mlp import swiglu, swiglu_spec
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, normal, ones
from atom_jax.sharding import constrain, share
from atom_jax.typing import AtomError, Batch, Output


@config.register
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and published options of a decoder, and how it is computed."""

    family: str = "llama"
    vocab_size: int = 264
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 768
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling | None = None
    tie_embeddings: bool = True
    # "full" or "sliding" for every layer; empty means all full. rope_scaling acts on full layers only.
    layer_types: tuple[str, ...] = ()
    # Tokens a sliding layer sees, its own included.
    sliding_window: int = 4096
    # Positions the model was made for.
    max_length: int = 8192
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    # Compute dtype; norms, softmax, logits and losses are float32 in any case.
    dtype: str = "float32"
    # Recompute each layer in the backward pass instead of storing its activations.
    remat: bool = False
    # What of the keys and values is kept: a policy of `kvcache.policies`, or None for everything.
    memory: Any = None
    # Corrections of the projections that are trained in place of the weights; models that are loaded have none.
    lora: LoRA | None = None

    def __post_init__(self):
        config.check(
            self, vocab_size=(1, 2**28), d_model=(1, 2**20), n_layers=(1, 10_000), n_heads=(1, 2**16),
            n_kv_heads=(1, 2**16), head_dim=(2, 2**16), d_ff=(1, 2**24), norm_eps=(0, 1), rope_theta=(1.01, 1e30),
            sliding_window=(1, 2**31 - 1), max_length=(1, 2**31 - 1),
            bos_id=(0, 2**28), eos_ids=(0, 2**28), pad_id=(0, 2**28),
        )  # fmt: skip
        if self.family not in FAMILIES:
            raise AtomError(f"family: unknown {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.n_heads % self.n_kv_heads:
            raise AtomError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.layer_types and len(self.layer_types) != self.n_layers:
            raise AtomError(f"layer_types names {len(self.layer_types)} layers, n_layers is {self.n_layers}")
        if set(self.layer_types) - {"full", "sliding"}:
            raise AtomError(f"layer_types: expected 'full' or 'sliding', got {self.layer_types}")
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        policies.check(self.memory)

    @functools.cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """What tells apart the attention of its layers."""
        return tuple(map(self._attention, range(self.n_layers)))

    def _attention(self, i: int) -> Attention:
        kind = self.layer_types[i] if self.layer_types else "full"
        scaling, window = (self.rope_scaling, None) if kind == "full" else (None, self.sliding_window)
        return Attention(
            self.n_heads, self.n_kv_heads, self.head_dim, self.head_dim, (self.rope_theta, scaling), window,
            self.norm_eps, policy_of(self.memory, i, kind),
        )  # fmt: skip


def spec(cfg: TransformerConfig) -> params.Tree:
    """ParamSpec tree; tensors under "layers" are stacked over a leading layer axis."""
    family, d = FAMILIES[cfg.family], cfg.d_model
    out_scale = (2 * cfg.n_layers) ** -0.5
    layer = {
        "attn_norm": ParamSpec((d,), (None,), ones),
        "attn": attention.with_learned(
            attention_spec(d, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, family.qk_norm, out_scale=out_scale),
            cfg.attentions,
        ),
        "mlp_norm": ParamSpec((d,), (None,), ones),
        "mlp": swiglu_spec(d, cfg.d_ff, out_scale),
    }
    if cfg.lora is not None:
        layer["lora"] = lora.spec(layer, cfg.lora)
    tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), normal(0.02)),
        "layers": params.stack(layer, cfg.n_layers),
        "norm": ParamSpec((d,), (None,), ones),
    }
    if not cfg.tie_embeddings:
        tree["unembed"] = ParamSpec((d, cfg.vocab_size), ("embed", "vocab"), normal(d**-0.5))
    return tree


def init_cache(cfg: TransformerConfig, batch_size: int, capacity: int, dtype: Any = None) -> Memory:
    """An empty memory with room for `capacity` tokens per row: what the policies of `cfg.memory` keep, in sliding
    layers a ring of the latest tokens."""
    ranks, dtype = attention.ranks(cfg.attentions), dtype or jnp.dtype(cfg.dtype)

    def empty(kind: Attention, numbers: tuple[int, ...]) -> Stack:
        return kind.empty([ranks[n] for n in numbers], batch_size, capacity, dtype)

    return Memory(layers.states(cfg.attentions, empty), jnp.zeros(batch_size, jnp.int32), fresh=True)


def apply(
    p: params.Tree, batch: Batch, *, cfg: TransformerConfig, cache: Memory | None = None
) -> tuple[Output, Memory | None]:
    """Logits float32 [b, t, v] for every position, and the cache after these tokens.

    With a cache, rows continue from `cache.length`; batch.positions must start there, real tokens (segment 1) come
    before padding (segment 0), and only real tokens count into the new length.
    """
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def hidden(
    p: params.Tree, batch: Batch, *, cfg: TransformerConfig, cache: Memory | None = None, **options: Any
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:
    """Final normalised states [b, t, d] in the compute dtype, the cache after these tokens, and what was learned.

    Without a cache, a model with learned evictors reports `evict`, bool [l, b, h, t] (by the key), `evict_soft`, f32
    of that shape (decisions with a gradient), `evict_logits` and `occupancy`, i32 [l, b, h].

    options: `key`, `mode`, `probe` and `tentative`, as for `blocks`.
    """
    x = constrain(lookup(p["embed"], batch.ids, cfg.dtype), "batch", "stored_length", None)
    tokens = Tokens(batch.positions, batch.segments)
    x, cache, seen = blocks(p["layers"], x, tokens, cfg=cfg, cache=cache, ids=batch.ids, **options)
    return rms_norm(x, p["norm"], cfg.norm_eps), cache, seen


def blocks(
    stacked: Any,
    x: jax.Array,
    tokens: Tokens,
    *,
    cfg: TransformerConfig,
    cache: Memory | None = None,
    ids: jax.Array | None = None,
    key: jax.Array | None = None,
    mode: Mode | None = None,
    probe: Probe | None = None,
    tentative: bool = False,
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """The layers alone (`spec(cfg)["layers"]`, or as `decode_params` has them) over inputs x [b, t, d], without a
    final norm: outputs, the cache after these tokens, and what was learned.

    ids: i32 [b, t] of tokens. key: noise for relaxed decisions, for training. mode: how decisions are made; None:
    relaxed with a key, else hard. probe: called in every layer without a cache; its results are `aux["probe"]`,
    stacked over layers. tentative: the cache stays as it is, and in its place is returned what `commit` takes.
    """
    context = Context(
        tokens, ids=ids, mode=mode, key=key, probe=probe, tentative=tentative, remat=cfg.remat and cache is None
    )
    if cache is not None:
        context = dataclasses.replace(context, length=cache.length, fresh=cache.fresh, reading=cache.reading)
    context, others = context.over(cfg.attentions)
    states = None if cache is None else cache.layers
    layer = functools.partial(_layer, cfg, context)
    told = attention.evidence(cfg.attentions, *tokens.positions.shape)
    (x, _), states, seen = layers.run_layers(layer, cfg.attentions, stacked, (x, told), states, others, context.remat)
    if cache is None or tentative:
        return x, states, seen
    states = states if cache.fresh else readings.agree(states)
    length = cache.length + jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)
    return x, cache.replace(layers=states, length=length, fresh=False), seen


def commit(cache: Memory, pending: Any, count_b: jax.Array) -> Memory:
    """The cache after the first count_b, i32 [b], of the tokens that `hidden` has read tentatively, as if only these
    had been read; of the others there is no trace."""
    states = layers.store(cache.layers, pending, count_b)
    return cache.replace(layers=states, length=cache.length + count_b, fresh=False)


def step(
    p: params.Tree, batch: Batch, *, cfg: TransformerConfig, cache: Memory
) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next token of every row (segment 0: of none): its states [b, 1, d], the cache after it, and the rows
    that have been read to the end, bool [b] (in models with learned units some wait for others: `models.hnet`)."""
    x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
    return x_b1d, cache, batch.segments[:, 0] > 0


def logits(p: params.Tree, x_btd: jax.Array, *, cfg: TransformerConfig) -> jax.Array:
    """Logits float32 [b, t, v] of final states; the product runs in the compute dtype and adds up in float32. With
    remembered states beside the parameters they are log-probabilities of the mixture with these (`nn.neighbours`)."""
    table = p["unembed"] if "unembed" in p else p["embed"].T
    out = jnp.einsum("btd,dv->btv", x_btd, table.astype(x_btd.dtype), preferred_element_type=jnp.float32)
    out = constrain(out, "batch", "length", "vocab")
    return neighbours.mixed(out, x_btd, p[neighbours.NAME]) if neighbours.NAME in p else out


def decode_params(p: params.Tree, cfg: TransformerConfig, unroll: bool) -> params.Tree:
    """Parameters laid out for generation, in the compute dtype; `hidden` and `logits` take them as they are.

    unroll: separate layers. One token through an unrolled stack reads every weight once; the scan copies each layer
      out first, which doubles the traffic on a CPU. What has the compute dtype and is not changed by a policy or LoRA
      is not copied: it is the memory of p. A small table that is also the head's gets a transposed copy "unembed".
    """
    p = lora.merged(p, cfg.lora)
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "unembed") if name in p}
    if "embed" in p and cfg.tie_embeddings and unroll and cfg.vocab_size <= SMALL_VOCAB:
        tables["unembed"] = tables["embed"].T
    return {**p, **tables, "layers": layers.laid_out(cfg.attentions, p["layers"], _lay, unroll, cfg.dtype)}


def _lay(kind: Attention, layer: params.Tree) -> params.Tree:
    return {**layer, "attn": attention.laid_out(kind, layer["attn"])}


def roomier(cfg: TransformerConfig) -> None:
    """Nothing here runs out of room (models with learned units do: `models.hnet`)."""


def _layer(
    cfg: TransformerConfig, context: Context, kind: Attention, p: Any, below: tuple, state: Any, others: Any
) -> tuple[tuple, Any, dict[str, Any]]:
    """below: the residual stream [b, t, d], and the evidence of the layers below, or None."""
    x, told = below
    p = params.cast(p, x.dtype)
    p = lora.beside(p, cfg.lora) if "lora" in p else p
    post = FAMILIES[cfg.family].post_norm
    with jax.named_scope("attention"):
        y = x if post else rms_norm(x, p["attn_norm"], cfg.norm_eps)
        y = constrain(y, "batch", "length", None)
        y, state, seen, told = attention.attention(p["attn"], x, y, state, kind, context, others, told)
        y = share(y)
        x = x + (rms_norm(y, p["attn_norm"], cfg.norm_eps) if post else y)
    with jax.named_scope("mlp"):
        y = x if post else rms_norm(x, p["mlp_norm"], cfg.norm_eps)
        y = swiglu(p["mlp"], constrain(y, "batch", "length", None))
        y = share(y)
        x = x + (rms_norm(y, p["mlp_norm"], cfg.norm_eps) if post else y)
    return (constrain(x, "batch", "stored_length", None), told), state, seen
