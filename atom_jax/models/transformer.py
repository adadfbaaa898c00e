"""Decoder-only transformers: Llama, Qwen3, OLMo 2 and OLMo 3 as pure functions over scanned layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config, params
from atom_jax.kvcache import policies
from atom_jax.kvcache.dense import Cache
from atom_jax.kvcache.dms import DMS, decide, low_rank
from atom_jax.kvcache.dms.decide import Mode
from atom_jax.kvcache.memory import Call
from atom_jax.models.transformer_memory import cache_use, full, grow, init_cache, read_whole, unstack
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens, attention_spec
from atom_jax.nn.embedding import SMALL_VOCAB, lookup
from atom_jax.nn.linear import project
from atom_jax.nn.mlp import swiglu, swiglu_spec
from atom_jax.nn.norm import rms_norm
from atom_jax.nn.self_attention import self_attend
from atom_jax.params import ParamSpec, normal, ones
from atom_jax.sharding import constrain, share
from atom_jax.typing import AtomError, Batch, Output

__all__ = [
    "FAMILIES", "TransformerConfig", "apply", "blocks", "cache_use", "decode_params", "full", "grow", "hidden",
    "init_cache", "logits", "read_whole", "roomier", "spec", "step", "unstack",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes one published family from another."""

    # Where queries and keys are normalised: "none", "head" (per head) or "full" (all heads together).
    qk_norm: str = "none"
    # Whether norms act on the output of attention and MLP instead of on their input.
    post_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen3": Family(qk_norm="head"),
    "olmo2": Family(qk_norm="full", post_norm=True),
    "olmo3": Family(qk_norm="full", post_norm=True),
}


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

    def __post_init__(self):
        config.check(
            self, vocab_size=(1, 2**28), d_model=(1, 2**20), n_layers=(1, 10_000), n_heads=(1, 2**16),
            n_kv_heads=(1, 2**16), head_dim=(2, 2**16), d_ff=(1, 2**24), norm_eps=(0, 1), rope_theta=(1.01, 1e30),
            sliding_window=(1, 2**31 - 1), max_length=(1, 2**31 - 1),
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
        if self.memory is not None and "sliding" in self.layer_types:
            raise AtomError("memory: policies are for models whose layers all see everything, not for sliding layers")

    @property
    def dms(self) -> DMS | None:
        """The learned evictors' configuration, or None."""
        return self.memory if isinstance(self.memory, DMS) else None

    def period(self) -> int:
        """Number of layers after which the layer types repeat: the layers of one scan step."""
        kinds = self.layer_types
        divisors = [p for p in range(1, self.n_layers + 1) if self.n_layers % p == 0]
        return next(p for p in divisors if all(k == kinds[i % p] for i, k in enumerate(kinds)))


def spec(cfg: TransformerConfig) -> params.Tree:
    """ParamSpec tree; tensors under "layers" are stacked over a leading layer axis."""
    family, d = FAMILIES[cfg.family], cfg.d_model
    out_scale = (2 * cfg.n_layers) ** -0.5
    layer = {
        "attn_norm": ParamSpec((d,), (None,), ones),
        "attn": attention_spec(d, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, family.qk_norm, out_scale=out_scale),
        "mlp_norm": ParamSpec((d,), (None,), ones),
        "mlp": swiglu_spec(d, cfg.d_ff, out_scale),
    }
    if cfg.dms is not None and (learned := cfg.dms.spec(layer["attn"])):
        layer["attn"]["dms"] = learned
    tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), normal(0.02)),
        "layers": params.stack(layer, cfg.n_layers),
        "norm": ParamSpec((d,), (None,), ones),
    }
    if not cfg.tie_embeddings:
        tree["unembed"] = ParamSpec((d, cfg.vocab_size), ("embed", "vocab"), normal(d**-0.5))
    return tree


def apply(
    p: params.Tree, batch: Batch, *, cfg: TransformerConfig, cache: Cache | None = None
) -> tuple[Output, Cache | None]:
    """Logits float32 [b, t, v] for every position, and the cache after these tokens.

    With a cache, rows continue from `cache.length`; batch.positions must start there, real tokens (segment 1) come
    before padding (segment 0), and only real tokens count into the new length.
    """
    x_btd, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    return Output(logits=logits(p, x_btd, cfg=cfg), aux=aux), cache


def hidden(
    p: params.Tree,
    batch: Batch,
    *,
    cfg: TransformerConfig,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    mode: Mode | None = None,
    probe: Probe | None = None,
) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
    """Final normalised states [b, t, d] in the compute dtype, the cache after these tokens, and what was learned.

    Without a cache, a model with learned evictors reports `evict`, bool [l, b, h, t] (by the key), `evict_soft`, f32
    of that shape (`dms.decide.Decisions.soft`), `evict_logits` and `occupancy`, i32 [l, b, h].

    key: noise for relaxed decisions, for training. mode: how decisions are made; None: relaxed with a key, else hard.
    probe: called in every layer (see `Probe`); its results are `aux["probe"]`, stacked over layers.
    """
    x = constrain(lookup(p["embed"], batch.ids, cfg.dtype), "batch", "stored_length", None)
    if mode is None:
        mode = Mode() if key is None or cfg.dms is None else Mode("relaxed", _noise(key, cfg, batch))
    tokens = Tokens(batch.positions, batch.segments)
    x, cache, seen = blocks(p["layers"], x, tokens, cfg=cfg, cache=cache, mode=mode, probe=probe)
    return rms_norm(x, p["norm"], cfg.norm_eps), cache, seen


def blocks(
    layers: Any,
    x: jax.Array,
    tokens: Tokens,
    *,
    cfg: TransformerConfig,
    cache: Cache | None = None,
    mode: Mode | None = None,
    probe: Probe | None = None,
) -> tuple[jax.Array, Cache | None, dict[str, Any]]:
    """The layers alone (`spec(cfg)["layers"]`, or a tuple of layers) over inputs x [b, t, d], without a final norm.
    The rest as for `hidden`."""
    mode = mode or Mode()
    context = _Context(cfg, tokens, cache, mode, probe)
    states = None if cache is None else cache.layers
    if isinstance(layers, tuple):
        new, seen = [], []
        for i, layer in enumerate(layers):
            noise = None if mode.noise is None else mode.noise[i]
            x, state, one = _layer(layer, x, None if states is None else states[i], noise, context, i)
            new.append(state)
            seen.append(one)
        states, seen = tuple(new), jax.tree.map(lambda *a: jnp.stack(a), *seen)
    else:
        x, states, seen = _scan(layers, x, states, context)
    if cache is not None:
        cache = Cache(layers=states, length=context.length)
    if "evict" in seen:
        count = functools.partial(decide.occupancy, tokens=context.tokens, window=cfg.dms.window)
        seen["occupancy"] = jax.vmap(count)(seen["evict"])
    return x, cache, seen


def _noise(key: jax.Array, cfg: TransformerConfig, batch: Batch) -> jax.Array:
    b, t = batch.ids.shape
    return decide.logistic(key, (cfg.n_layers, b, cfg.n_kv_heads, t))


def step(p: params.Tree, batch: Batch, *, cfg: TransformerConfig, cache: Cache) -> tuple[jax.Array, Cache, jax.Array]:
    """Reads the next token of every row (segment 0: of none): its states [b, 1, d], the cache after it, and the rows
    that have been read to the end, bool [b] (in models with learned units some wait for others: `models.hnet`)."""
    x_b1d, cache, _ = hidden(p, batch, cfg=cfg, cache=cache)
    return x_b1d, cache, batch.segments[:, 0] > 0


def logits(p: params.Tree, x_btd: jax.Array, *, cfg: TransformerConfig) -> jax.Array:
    """Logits float32 [b, t, v] of final states; the product runs in the compute dtype and adds up in float32."""
    table = p["unembed"] if "unembed" in p else p["embed"].T
    out = jnp.einsum("btd,dv->btv", x_btd, table.astype(x_btd.dtype), preferred_element_type=jnp.float32)
    return constrain(out, "batch", "length", "vocab")


def decode_params(p: params.Tree, cfg: TransformerConfig, unroll: bool) -> params.Tree:
    """Parameters laid out for generation, in the compute dtype; `hidden` and `logits` take them as they are.

    unroll: separate layers whose query, key and value matrices, and gate and up matrices, lie side by side.
      One token through an unrolled stack reads every weight once; the scan copies each layer out first, which
      doubles the traffic on a CPU. A small table that is also the head's gets a transposed copy "unembed".
    """
    tables = {name: params.cast(p[name], cfg.dtype) for name in ("embed", "unembed") if name in p}
    if "embed" in p and cfg.tie_embeddings and unroll and cfg.vocab_size <= SMALL_VOCAB:
        tables["unembed"] = tables["embed"].T
    if cfg.dms is not None and cfg.dms.rank:
        attn = jax.vmap(low_rank.corrected)(p["layers"]["attn"])
        p = {**p, "layers": {**p["layers"], "attn": attn}}
    if unroll:
        # One small program, run for every layer: slicing all of them in one program compiles for seconds.
        layers = tuple(_decode_layer(p["layers"], i, cfg.dtype) for i in range(cfg.n_layers))
    else:
        layers = params.cast(p["layers"], cfg.dtype)
    return {**p, **tables, "layers": layers}


@functools.partial(jax.jit, static_argnames="dtype")
def _decode_layer(layers: params.Tree, i: int, dtype: str) -> params.Tree:
    layer = params.cast(jax.tree.map(lambda x: x[i], layers), dtype)
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    attn["qkv"] = jnp.concatenate([attn.pop(name) for name in "qkv"], axis=1)
    mlp["gate_up"] = jnp.concatenate([mlp.pop("gate"), mlp.pop("up")], axis=1)
    return {**layer, "attn": attn, "mlp": mlp}


def roomier(cfg: TransformerConfig) -> None:
    """Nothing here runs out of room (models with learned units do: `models.hnet`)."""


# (parameters of the layer, its input x [b, t, d], q [b, h, g, t, k] and k [b, h, t, k] after RoPE, v, Decisions or
# None, tokens, this layer's `mode.noise`) -> a pytree of arrays.
Probe = Callable[..., Any]


class _Context:
    """What all layers of one call share: where tokens stand and the rotary tables of each layer type."""

    def __init__(self, cfg: TransformerConfig, tokens: Tokens, cache: Cache | None, mode: Mode, probe: Probe | None):
        self.cfg, self.cache, self.mode, self.probe, self.tokens = cfg, cache, mode, probe, tokens
        kinds = set(cfg.layer_types) or {"full"}
        self.rope = {
            kind: rope.tables(
                tokens.positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling if kind == "full" else None
            )
            for kind in sorted(kinds)
        }
        if cache is not None:
            self.length = cache.length + jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)

    def kind(self, i: int) -> str:
        return self.cfg.layer_types[i] if self.cfg.layer_types else "full"


def _scan(layers: Any, x: jax.Array, states: Any, context: _Context) -> tuple[jax.Array, Any, Any]:
    cfg = context.cfg
    period = cfg.period()

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        new = []
        for i in range(period):
            layer, state, noise = jax.tree.map(lambda a, i=i: a[i], inputs)
            x, *rest = _layer(layer, x, state, noise, context, i)
            new.append(rest)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *new)

    if cfg.remat:
        step = jax.checkpoint(step)
    grouped = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), (layers, states, context.mode.noise))
    x, rest = jax.lax.scan(step, x, grouped)
    states, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rest)
    return x, states, seen


def _layer(p: Any, x: jax.Array, state: Any, noise: Any, context: _Context, i: int) -> tuple[jax.Array, Any, Any]:
    cfg, dtype = context.cfg, x.dtype
    p = params.cast(p, dtype)
    post = FAMILIES[cfg.family].post_norm
    with jax.named_scope("attention"):
        y = x if post else rms_norm(x, p["attn_norm"], cfg.norm_eps)
        y = constrain(y, "batch", "length", None)
        y, state, seen = _attention(p["attn"], x, y, state, noise, context, context.kind(i))
        y = share(y)
        x = x + (rms_norm(y, p["attn_norm"], cfg.norm_eps) if post else y)
    with jax.named_scope("mlp"):
        y = x if post else rms_norm(x, p["mlp_norm"], cfg.norm_eps)
        y = swiglu(p["mlp"], constrain(y, "batch", "length", None))
        y = share(y)
        x = x + (rms_norm(y, p["mlp_norm"], cfg.norm_eps) if post else y)
    return constrain(x, "batch", "stored_length", None), state, seen


def _attention(
    p: Any, x: jax.Array, y: jax.Array, state: Any, noise: Any, context: _Context, kind: str
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Attention of a layer whose input is x and whose projections read y [b, t, d]; its memory afterwards; and what
    is to be reported, by name."""
    cfg, tokens, cache, dms = context.cfg, context.tokens, context.cache, context.cfg.dms
    if dms is not None and dms.rank and context.mode.kind in ("hard", "relaxed"):
        p = low_rank.corrected(p)
    q, k, v = _projections(p, y, cfg)
    z = None if dms is None else decide.logits(p.get("dms"), x, q, dms, cfg.n_kv_heads, cfg.norm_eps)
    lend = functools.partial(decide.lend, h=cfg.n_kv_heads, fade=context.mode.fade)
    if dms is None or dms.form != "borrowed":
        lend = lambda q: q  # noqa: E731
    q, k = lend(rope.rotate(lend(q), *context.rope[kind])), rope.rotate(k, *context.rope[kind])
    b, t, n, size = q.shape
    q = q.reshape(b, t, cfg.n_kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    window = cfg.sliding_window if kind == "sliding" else None
    seen: dict[str, Any] = {}
    if cache is None:
        keep, chosen = None, None
        if dms is not None:
            mode = context.mode.replace(noise=noise)
            chosen = decide.decide(p.get("dms"), z, q, k, tokens, dms, mode)
            keep = chosen.keep
            seen |= {"evict": chosen.evict, "evict_soft": chosen.soft, "evict_logits": chosen.z}
        if context.probe is not None:
            seen["probe"] = context.probe(p, x, q, k, v, chosen, tokens, noise)
        wait = 0 if dms is None else dms.window
        out = self_attend(q, k, v, tokens, window=window, keep_bht=keep, keep_window=wait)
    else:
        scaling = cfg.rope_scaling if kind == "full" else None
        call = Call(
            q, k, v, tokens, cache.length, z, p.get("dms"),
            window=window, fresh=cache.fresh, rope=(cfg.rope_theta, scaling),
        )  # fmt: skip
        out, state = state.extend(call)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, size)
    return project(out, p["o"], inputs=2), state, seen


def _projections(p: Any, x_btd: jax.Array, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [b, t, n, k], keys and values [b, t, h, k], normalised where the family does so."""
    if "qkv" in p:
        q, k, v = jnp.split(project(x_btd, p["qkv"]), [cfg.n_heads, cfg.n_heads + cfg.n_kv_heads], axis=2)
    else:
        q, k, v = (constrain(project(x_btd, p[name]), "batch", "length", "heads", None) for name in "qkv")
    return _normalise(q, p.get("q_norm"), cfg), _normalise(k, p.get("k_norm"), cfg), v


def _normalise(x_btnk: jax.Array, weight: jax.Array | None, cfg: TransformerConfig) -> jax.Array:
    """RMS normalisation over a head or over all heads, by the size of `weight`; none without one."""
    if weight is None:
        return x_btnk
    if weight.shape[0] == x_btnk.shape[-1]:
        return rms_norm(x_btnk, weight, cfg.norm_eps)
    return rms_norm(x_btnk.reshape(*x_btnk.shape[:2], -1), weight, cfg.norm_eps).reshape(x_btnk.shape)
