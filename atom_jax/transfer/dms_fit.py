"""Evictors fitted in closed form, without training: a ridge regression on what the dense model loses with a key.

For every layer, key/value head and key that leaves the window, the target is the logarithm of the key's importance to
later queries (`importance`), and the features are those of the decision itself: the normalised residual stream one
token later and, for the observed form, the attention received within the window. A key is evicted when its predicted
importance is under one threshold for all layers and heads, so that these share the budget among themselves.

Where layers share evidence (`Settings.shared`), what they tell comes first: of c channels, channel j predicts the
mean of a key's targets over all layers and heads from what the lowest (j + 1) / c of the layers saw it receive, of
which a layer in between hears the part that lies below it. What it hears is one more feature of its own prediction.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dms import DMS, decide, observed
from atom_jax.kvcache.dms.config import FEATURES, LEARNED
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blockwise import blockwise_lse
from atom_jax.nn.norm import rms_norm
from atom_jax.transfer import ridge
from atom_jax.transfer.ridge import BLOCK, LEAST_QUERIES, FitConfig
from atom_jax.typing import AtomError, Batch

FLOOR = 1e-6


def fit(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Parameters whose evictors are fitted; the others are as they were.

    rows: at least `windows` + 3 `calibration` batches (6 with `Settings.beyond`) of one length, with one document
    in a row or several. Raises AtomError for a model without a projection to fit, or documents that are too short for
    the window or the entries.
    """
    dms = cfg.memory
    if not isinstance(dms, DMS) or dms.form not in LEARNED or not dms.bias:
        raise AtomError("fit: the model's memory must be dms of the form adapter or observed, with bias=true")
    if how.target == "output":
        raise AtomError("fit.target: output is of merging; evictors are fitted to attention or loss")
    rows, kept = iter(rows), []

    def target(batch: Batch, number: int) -> jax.Array:
        return targets(params, batch, jax.random.key(how.seed + number), cfg=cfg, target=how.target)

    def evidence_of(batch: Batch, number: int) -> dict[str, jax.Array]:
        kept.append((batch, target(batch, number)))
        return _joint_sums(params, *kept[-1], cfg=cfg)

    def sums_of(batch: Batch, number: int) -> dict[str, jax.Array]:
        y = kept[number][1] if kept else target(batch, number)
        return _sums(params, batch, y, cfg=cfg)

    if dms.shared and (sums := ridge.gathered(evidence_of, rows, cfg, how, say)) is not None:
        params = ridge.learned(params, cfg, {"tell": jnp.asarray(tells(sums, cfg, how.ridge), jnp.float32)})
    again = (batch for batch, _ in list(kept)) if kept else rows
    if (sums := ridge.gathered(sums_of, again, cfg, how, say)) is not None:
        params = put(params, ridge.solve(sums, how.ridge), cfg, how.steepness, 0.0)
    return calibrate(params, cfg, rows, how, say)


def calibrate(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """See `ridge.calibrate`. Where slopes (`Settings.beyond`) begin within rows, the same share is to be left of what
    lies before and of whole rows: first the threshold is moved by as many rows' beginnings, then the slopes."""
    rows, beyond = iter(rows), cfg.memory.beyond
    row = next(rows)
    rows, t = itertools.chain([row], rows), row.ids.shape[1]
    ends = (cfg.memory.sinks, cfg.memory.window + 1)
    move = lambda name: lambda params, by: shifted(params, by, cfg, name)  # noqa: E731
    if ridge.thresholds(cfg.memory, t) == 1:
        return ridge.calibrate(params, cfg, rows, how, say, *ends, move("bias"))
    cut = (jax.tree.map(lambda x: x[:, :beyond], row) for row in rows)
    share = dataclasses.replace(how, entries=round(how.entries * beyond / t))
    params = ridge.calibrate(params, cfg, cut, share, say, *ends, move("bias"))
    doublings = lambda positions: np.log2(np.maximum(positions / beyond, 1.0))  # noqa: E731
    return ridge.calibrate(params, cfg, rows, how, say, *ends, move("slope"), doublings)


def targets(params: Any, batch: Batch, key: jax.Array, *, cfg: TransformerConfig, target: str) -> jax.Array:
    """Log-importance of every key to the queries after its window, f32 [l, b, h, t], in the dense model."""
    if target == "attention":
        return _attention_targets(params, batch, cfg=cfg)
    return _loss_targets(params, batch, key, cfg=cfg)


@jax.jit(static_argnames="cfg")
def _attention_targets(params: Any, batch: Batch, *, cfg: TransformerConfig) -> jax.Array:
    def probe(p, heads, call):
        return jnp.log(_largest(call.q, call.k, call.v, call.tokens, cfg.memory.window) + FLOOR)

    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]


def _largest(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, window: int) -> jax.Array:
    """Largest attention f32 [b, h, t] that a query more than `window` after it pays to each key."""
    places = (tokens.positions, tokens.segments, tokens.positions, tokens.segments)
    _, lse = blockwise_lse(q, k, v, places, None, True, min(q.shape[3], BLOCK))
    n = q.shape[3] // BLOCK

    def one(i: jax.Array) -> jax.Array:
        q_i, lse_i = (jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 3) for x in (q, lse))
        scores = jnp.einsum("bhgtk,bhsk->bhgts", q_i, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        here = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 1), tokens)
        far = here.positions[:, :, None] - tokens.positions[:, None] > window
        far = (far & (here.segments[:, :, None] == tokens.segments[:, None]))[:, None, None]
        scores = jnp.where(jnp.broadcast_to(far, scores.shape), scores - lse_i[..., None], NEGATIVE)
        return jnp.exp(scores.max((2, 3)))

    return jax.lax.map(one, jnp.arange(n)).max(0)


@jax.jit(static_argnames="cfg")
def _loss_targets(params: Any, batch: Batch, key: jax.Array, *, cfg: TransformerConfig) -> jax.Array:
    b, t = batch.ids.shape
    keep = jnp.zeros((cfg.n_layers, b, cfg.n_kv_heads, t), jnp.float32)
    # Positions whose logits exist at once.
    size = max(d for d in range(1, min(t, 256) + 1) if t % d == 0)

    def likelihood(keep: jax.Array) -> jax.Array:
        x, _, _ = transformer.hidden(
            params, batch, cfg=dataclasses.replace(cfg, remat=True), mode=Mode("given", keep)
        )

        def one(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
            x, key = part
            logits = transformer.logits(params, x, cfg=cfg)
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)
            return total + chosen.sum(), None

        parts = jnp.moveaxis(x.reshape(b, -1, size, x.shape[-1]), 1, 0)
        return jax.lax.scan(jax.checkpoint(one), jnp.float32(0), (parts, jax.random.split(key, t // size)))[0]

    return jnp.log(jnp.square(jax.grad(likelihood)(keep)) + FLOOR)


def _counts(batch: Batch, cfg: TransformerConfig) -> jax.Array:
    """f32 [b, t], 1 for the keys that a fit counts."""
    tokens = Tokens(batch.positions, batch.segments)
    counts = (batch.positions >= cfg.memory.sinks) & (tokens.left > cfg.memory.window + LEAST_QUERIES - 1)
    return counts.astype(jnp.float32)


@jax.jit(static_argnames="cfg")
def _joint_sums(params: Any, batch: Batch, y_lbht: jax.Array, *, cfg: TransformerConfig) -> dict[str, jax.Array]:
    """Sums over keys of the products of what all heads of all layers saw, in this order, and 1, with each other (xx
    [1, f, f]) and with the mean target (xy [1, f])."""

    def probe(p, heads, call):
        return observed.observe(call.q, call.k, call.tokens, cfg.memory.window)

    seen = transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]
    x = seen.transpose(1, 3, 0, 2, 4).reshape(*batch.ids.shape, -1)
    x, counts = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1), _counts(batch, cfg)
    y = y_lbht.mean((0, 2)) * counts
    return {"xx": jnp.einsum("btd,bte,bt->de", x, x, counts)[None], "xy": jnp.einsum("btd,bt->d", x, y)[None]}


def tells(sums: dict[str, np.ndarray], cfg: TransformerConfig, strength: float) -> np.ndarray:
    """What layers tell, float64 [l, FEATURES + 1, h, c], from `_joint_sums`: ridge regressions, of channel j from the
    lowest (j + 1) / c of the layers, whose sums up to any layer have the mean 0."""
    layers, heads, channels = cfg.n_layers, cfg.n_kv_heads, cfg.memory.shared
    xx, xy = (np.asarray(sums[name][0], np.float64) for name in ("xx", "xy"))
    n, mean = xx[-1, -1], xx[-1, :-1] / xx[-1, -1]
    a, b = xx[:-1, :-1] / n - np.outer(mean, mean), xy[:-1] / n - mean * xy[-1] / n
    out = np.zeros((layers, heads, FEATURES + 1, channels))
    for j in range(channels):
        lowest = -(-layers * (j + 1) // channels)
        f = lowest * heads * FEATURES
        some = a[:f, :f]
        weight = np.linalg.solve(some + strength * np.trace(some) / f * np.eye(f), b[:f])
        parts = np.stack([weight, -weight * mean[:f]]).reshape(2, lowest, heads, FEATURES)
        out[:lowest, :, :FEATURES, j], out[:lowest, :, FEATURES, j] = parts[0], parts[1].sum(-1)
    return out.transpose(0, 2, 1, 3)


@jax.jit(static_argnames="cfg")
def _sums(params: Any, batch: Batch, y_lbht: jax.Array, *, cfg: TransformerConfig) -> dict[str, jax.Array]:
    """Sums over keys that the normal equations need, for every layer: of the features common to all heads (xx), of
    those of single heads (oo), of both (xo), and with the target (xy, oy)."""
    counts = _counts(batch, cfg)

    def probe(p, heads, call):
        y = call.mode.noise
        x = rms_norm(heads.x_btd, p["dms"]["norm"], cfg.norm_eps).astype(jnp.float32)
        x = jnp.concatenate([jnp.roll(x, -1, axis=1), jnp.ones_like(x[..., :1])], axis=-1)
        x = x * counts[..., None]
        o = observed.observe(call.q, call.k, call.tokens, cfg.memory.window)
        if cfg.memory.form != "observed":
            o = jnp.zeros_like(o)
        if cfg.memory.shared:
            told = decide.from_observed(p["dms"], o, call.evidence, cfg.memory)[1]
            told = jnp.broadcast_to(told[:, None], (*o.shape[:3], told.shape[-1]))
            o = jnp.concatenate([o, told], axis=-1)
        return {
            "xx": jnp.einsum("btd,bte->de", x, x),
            "xo": jnp.einsum("btd,bhtf->hdf", x, o),
            "oo": jnp.einsum("bhtf,bhtg,bt->hfg", o, o, counts),
            "xy": jnp.einsum("btd,bht->hd", x, y),
            "oy": jnp.einsum("bhtf,bht,bt->hf", o, y, counts),
        }

    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off", y_lbht), probe=probe)[2]["probe"]


def put(params: Any, weights: tuple, cfg: TransformerConfig, steepness: float, threshold: float) -> Any:
    """Parameters whose decision logit is steepness * (threshold - prediction)."""
    alpha, constant, seen = weights
    s = steepness / cfg.memory.scale
    new = {
        "alpha": jnp.asarray(-s * alpha, jnp.float32),
        "bias": jnp.asarray(s * (threshold - constant) + cfg.memory.offset / cfg.memory.scale, jnp.float32),
    }
    if cfg.memory.form == "observed":
        new["observed"] = jnp.asarray(-s * seen[:, :FEATURES], jnp.float32)
    if cfg.memory.shared:
        new["hear"] = jnp.asarray(-s * seen[:, FEATURES:], jnp.float32)
    return ridge.learned(params, cfg, new)


def shifted(params: Any, move: float, cfg: TransformerConfig, name: str = "bias") -> Any:
    """Parameters whose decision logits are all larger by `move`; name "slope": by so much per doubling of the
    position."""
    there = params["layers"]["attn"]["dms"][name]
    return ridge.learned(params, cfg, {name: there + move / cfg.memory.scale})
