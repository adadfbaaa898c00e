"""Evictors fitted in closed form, without training: a ridge regression on what the dense model loses with a key.

For every layer, key/value head and key that leaves the window, the target is the logarithm of the key's importance to
later queries (`importance`), and the features are those of the decision itself: the normalised residual stream one
token later and, for the observed form, the attention received within the window. A key is evicted when its predicted
importance is under one threshold for all layers and heads, so that these share the budget among themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.kvcache.dms import DMS, observed
from atom_jax.kvcache.dms.config import FEATURES, LEARNED
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blockwise import blockwise_lse
from atom_jax.nn.norm import rms_norm
from atom_jax.typing import AtomError, Batch

TARGETS = ("attention", "loss")
# Queries after the window that a key needs to count in the fit.
LEAST_QUERIES = 64
# Queries per block of the pass that finds the largest attention.
BLOCK = 128
FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """target: "attention", log of the largest attention that a query after the window pays to the key; "loss", log of
        the squared change of log-likelihood (of tokens drawn from the model) with the key's weight in attention.
    windows: rows of text for the regression; 0: the evictors stay as they are, but for the threshold.
    calibration: rows for each adjustment of the threshold.
    ridge: regularisation as a share of the mean diagonal. steepness: decision logit per unit of log-importance.
    entries: keys that a head should hold on average after a row, sinks and window included.
    """

    target: str = "attention"
    windows: int = 16
    calibration: int = 4
    ridge: float = 1e-3
    steepness: float = 4.0
    entries: int = 512
    seed: int = 0

    def __post_init__(self):
        config.check(
            self, windows=(0, 2**20), calibration=(1, 2**20), ridge=(0, 1e6), steepness=(0, 1e6),
            entries=(1, 2**31 - 1), seed=(0, 2**31 - 1),
        )  # fmt: skip
        if self.target not in TARGETS:
            raise AtomError(f"fit.target: expected one of {', '.join(TARGETS)}, got {self.target!r}")


def fit(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[np.ndarray],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Parameters whose evictors are fitted; the others are as they were.

    rows: i32 [b, t] of token ids, at least `windows` + 3 `calibration` of them, of one length. Raises AtomError for a
    model without a projection to fit, or rows that are too short for the window or the entries.
    """
    dms = cfg.memory
    if not isinstance(dms, DMS) or dms.form not in LEARNED or not dms.bias:
        raise AtomError("fit: the model's memory must be dms of the form adapter or observed, with bias=true")
    rows = iter(rows)
    sums = None
    for number in range(how.windows):
        ids = _take(rows, cfg, how)
        y = targets(params, ids, jax.random.key(how.seed + number), cfg=cfg, target=how.target)
        new = _sums(params, ids, y, cfg=cfg)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        say(f"fit: {number + 1} of {how.windows} rows")
    if sums is not None:
        params = put(params, solve(jax.device_get(sums), how.ridge), cfg, how.steepness, 0.0)
    return calibrate(params, cfg, rows, how, say)


def calibrate(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[np.ndarray],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Moves the threshold of all heads together until `how.entries` keys per head are left after a row, on average.

    Three times, because what is evicted in one layer changes the decisions of those above.
    """
    rows = iter(rows)
    for _ in range(3):
        logits = []
        for _ in range(how.calibration):
            z, held = _logits(params, _take(rows, cfg, how), cfg=cfg)
            logits.append((np.asarray(z), float(held)))
        t = logits[0][0].shape[-1]
        first, last = cfg.memory.sinks, t - cfg.memory.window - 1
        kept = (how.entries - first - cfg.memory.window - 1) / (last - first)
        if not 0 < kept < 1:
            raise AtomError(
                f"fit.entries: {how.entries} is impossible with a window of {cfg.memory.window} and rows of {t}"
            )
        z = np.concatenate([x[..., first:last].ravel() for x, _ in logits])
        move = -float(np.quantile(z, kept))
        params = shifted(params, move, cfg)
        say(f"fit: {np.mean([h for _, h in logits]):.0f} entries held, threshold moved by {move:.3f}")
    return params


def targets(params: Any, ids_bt: jax.Array, key: jax.Array, *, cfg: TransformerConfig, target: str) -> jax.Array:
    """Log-importance of every key to the queries after its window, f32 [l, b, h, t], in the dense model."""
    if target == "attention":
        return _attention_targets(params, ids_bt, cfg=cfg)
    return _loss_targets(params, ids_bt, key, cfg=cfg)


@jax.jit(static_argnames="cfg")
def _attention_targets(params: Any, ids_bt: jax.Array, *, cfg: TransformerConfig) -> jax.Array:
    def probe(p, heads, call):
        return jnp.log(_largest(call.q, call.k, call.v, call.tokens, cfg.memory.window) + FLOOR)

    return transformer.hidden(params, _batch(ids_bt), cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]


def _largest(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, window: int) -> jax.Array:
    """Largest attention f32 [b, h, t] that a query more than `window` after it pays to each key."""
    places = (tokens.positions, tokens.segments, tokens.positions, tokens.segments)
    _, lse = blockwise_lse(q, k, v, places, None, True, min(q.shape[3], BLOCK))
    n = q.shape[3] // BLOCK

    def one(i: jax.Array) -> jax.Array:
        q_i, lse_i = (jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 3) for x in (q, lse))
        scores = jnp.einsum("bhgtk,bhsk->bhgts", q_i, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        here = jax.lax.dynamic_slice_in_dim(tokens.positions, i * BLOCK, BLOCK, 1)
        far = (here[:, :, None] - tokens.positions[:, None] > window)[:, None, None]
        scores = jnp.where(jnp.broadcast_to(far, scores.shape), scores - lse_i[..., None], NEGATIVE)
        return jnp.exp(scores.max((2, 3)))

    return jax.lax.map(one, jnp.arange(n)).max(0)


@jax.jit(static_argnames="cfg")
def _loss_targets(params: Any, ids_bt: jax.Array, key: jax.Array, *, cfg: TransformerConfig) -> jax.Array:
    b, t = ids_bt.shape
    batch = _batch(ids_bt)
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


@jax.jit(static_argnames="cfg")
def _sums(params: Any, ids_bt: jax.Array, y_lbht: jax.Array, *, cfg: TransformerConfig) -> dict[str, jax.Array]:
    """Sums over keys that the normal equations need, for every layer: of the features common to all heads (xx), of
    those of single heads (oo), of both (xo), and with the target (xy, oy)."""
    t = ids_bt.shape[1]
    place = jnp.arange(t)
    counts = (place >= cfg.memory.sinks) & (place < t - cfg.memory.window - LEAST_QUERIES)

    def probe(p, heads, call):
        y = call.mode.noise
        x = rms_norm(heads.x_btd, p["dms"]["norm"], cfg.norm_eps).astype(jnp.float32)
        x = jnp.concatenate([jnp.roll(x, -1, axis=1), jnp.ones_like(x[..., :1])], axis=-1)
        x = x * counts[None, :, None]
        o = observed.observe(call.q, call.k, call.tokens, cfg.memory.window)
        if cfg.memory.form != "observed":
            o = jnp.zeros_like(o)
        return {
            "xx": jnp.einsum("btd,bte->de", x, x),
            "xo": jnp.einsum("btd,bhtf->hdf", x, o),
            "oo": jnp.einsum("bhtf,bhtg,t->hfg", o, o, counts.astype(jnp.float32)),
            "xy": jnp.einsum("btd,bht->hd", x, y),
            "oy": jnp.einsum("bhtf,bht,t->hf", o, y, counts.astype(jnp.float32)),
        }

    return transformer.hidden(params, _batch(ids_bt), cfg=cfg, mode=Mode("off", y_lbht), probe=probe)[2]["probe"]


def solve(sums: dict[str, np.ndarray], ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the prediction, float64: [l, d, h] on the residual stream, [l, h] constant, [l, 3, h] on what was
    observed."""
    layers, heads, d = sums["xy"].shape
    out = np.zeros((layers, d + FEATURES, heads))
    for i in range(layers):
        for j in range(heads):
            xx, xo, oo = (
                np.asarray(sums[n][at], np.float64) for n, at in (("xx", i), ("xo", (i, j)), ("oo", (i, j)))
            )
            a = np.block([[xx, xo], [xo.T, oo]])
            b = np.concatenate([sums["xy"][i, j], sums["oy"][i, j]])
            out[i, :, j] = np.linalg.solve(a + ridge * np.trace(a) / len(a) * np.eye(len(a)), b)
    return out[:, : d - 1], out[:, d - 1], out[:, d:]


def put(params: Any, weights: tuple, cfg: TransformerConfig, steepness: float, threshold: float) -> Any:
    """Parameters whose decision logit is steepness * (threshold - prediction)."""
    alpha, constant, seen = weights
    attn, s = params["layers"]["attn"], steepness / cfg.memory.scale
    new = {
        "norm": attn["dms"]["norm"],
        "alpha": jnp.asarray(-s * alpha, jnp.float32),
        "bias": jnp.asarray(s * (threshold - constant) + cfg.memory.offset / cfg.memory.scale, jnp.float32),
    }
    if cfg.memory.form == "observed":
        new["observed"] = jnp.asarray(-s * seen, jnp.float32)
    return {**params, "layers": {**params["layers"], "attn": {**attn, "dms": new}}}


def shifted(params: Any, move: float, cfg: TransformerConfig) -> Any:
    """Parameters whose decision logits are all larger by `move`."""
    attn = params["layers"]["attn"]
    dms = {**attn["dms"], "bias": attn["dms"]["bias"] + move / cfg.memory.scale}
    return {**params, "layers": {**params["layers"], "attn": {**attn, "dms": dms}}}


@jax.jit(static_argnames="cfg")
def _logits(params: Any, ids_bt: jax.Array, *, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Decision logits f32 [l, b, h, t] with eviction on, and the mean number of keys left at the end."""
    _, _, aux = transformer.hidden(params, _batch(ids_bt), cfg=cfg)
    return aux["evict_logits"], jnp.mean(aux["occupancy"].astype(jnp.float32))


def _batch(ids_bt: jax.Array) -> Batch:
    positions = jnp.broadcast_to(jnp.arange(ids_bt.shape[1])[None], ids_bt.shape)
    return Batch(ids_bt, positions, jnp.ones_like(ids_bt))


def _take(rows: Any, cfg: TransformerConfig, how: FitConfig) -> jax.Array:
    ids = jnp.asarray(next(rows), jnp.int32)
    if ids.shape[1] % BLOCK or ids.shape[1] < cfg.memory.window + 2 * LEAST_QUERIES:
        raise AtomError(f"fit: rows of {ids.shape[1]} tokens; expected a multiple of {BLOCK}, longer than the window")
    return ids
