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
    entries: keys that a head should hold on average after a document, sinks and window included.
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
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Parameters whose evictors are fitted; the others are as they were.

    rows: at least `windows` + 3 `calibration` batches of one length, with one document in a row or several. Raises
    AtomError for a model without a projection to fit, or documents that are too short for the window or the entries.
    """
    dms = cfg.memory
    if not isinstance(dms, DMS) or dms.form not in LEARNED or not dms.bias:
        raise AtomError("fit: the model's memory must be dms of the form adapter or observed, with bias=true")
    rows = iter(rows)
    sums = None
    for number in range(how.windows):
        batch = _take(rows)
        y = targets(params, batch, jax.random.key(how.seed + number), cfg=cfg, target=how.target)
        new = _sums(params, batch, y, cfg=cfg)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        say(f"fit: {number + 1} of {how.windows} rows")
    if sums is not None:
        if not np.asarray(sums["xx"])[0, -1, -1]:
            least = cfg.memory.sinks + cfg.memory.window + LEAST_QUERIES
            raise AtomError(f"fit: no document of the data is longer than {least} tokens, as it takes")
        params = put(params, solve(jax.device_get(sums), how.ridge), cfg, how.steepness, 0.0)
    return calibrate(params, cfg, rows, how, say)


def calibrate(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Moves the threshold of all heads together until `how.entries` keys per head are left after a document, on
    average.

    Three times, because what is evicted in one layer changes the decisions of those above.
    """
    rows = iter(rows)
    for _ in range(3):
        logits, held = [], []
        # Of all documents: keys that stay in any case, and those about which is decided.
        sure = open_ = documents = 0
        for _ in range(how.calibration):
            batch = _take(rows)
            z, entries = _logits(params, batch, cfg=cfg)
            tokens = Tokens(batch.positions, batch.segments)
            decided = np.asarray((tokens.positions >= cfg.memory.sinks) & (tokens.left > cfg.memory.window))
            logits.append(np.moveaxis(np.asarray(z), 1, 2)[:, :, decided].ravel())
            held.append(float(entries))
            documents += int(batch.segments.max(1).sum())
            open_ += int(decided.sum())
            sure += int((np.asarray(batch.segments) > 0).sum()) - int(decided.sum())
        kept = (how.entries * documents - sure) / max(open_, 1)
        if not 0 < kept < 1:
            raise AtomError(
                f"fit.entries: {how.entries} is impossible with a window of {cfg.memory.window} and documents of"
                f" {(sure + open_) / max(documents, 1):.0f} tokens"
            )
        move = -float(np.quantile(np.concatenate(logits), kept))
        params = shifted(params, move, cfg)
        say(f"fit: {np.sum(held) / documents:.0f} entries held, threshold moved by {move:.3f}")
    return params


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


@jax.jit(static_argnames="cfg")
def _sums(params: Any, batch: Batch, y_lbht: jax.Array, *, cfg: TransformerConfig) -> dict[str, jax.Array]:
    """Sums over keys that the normal equations need, for every layer: of the features common to all heads (xx), of
    those of single heads (oo), of both (xo), and with the target (xy, oy)."""
    tokens = Tokens(batch.positions, batch.segments)
    counts = (batch.positions >= cfg.memory.sinks) & (tokens.left > cfg.memory.window + LEAST_QUERIES - 1)
    counts = counts.astype(jnp.float32)

    def probe(p, heads, call):
        y = call.mode.noise
        x = rms_norm(heads.x_btd, p["dms"]["norm"], cfg.norm_eps).astype(jnp.float32)
        x = jnp.concatenate([jnp.roll(x, -1, axis=1), jnp.ones_like(x[..., :1])], axis=-1)
        x = x * counts[..., None]
        o = observed.observe(call.q, call.k, call.tokens, cfg.memory.window)
        if cfg.memory.form != "observed":
            o = jnp.zeros_like(o)
        return {
            "xx": jnp.einsum("btd,bte->de", x, x),
            "xo": jnp.einsum("btd,bhtf->hdf", x, o),
            "oo": jnp.einsum("bhtf,bhtg,bt->hfg", o, o, counts),
            "xy": jnp.einsum("btd,bht->hd", x, y),
            "oy": jnp.einsum("bhtf,bht,bt->hf", o, y, counts),
        }

    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off", y_lbht), probe=probe)[2]["probe"]


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
def _logits(params: Any, batch: Batch, *, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Decision logits f32 [l, b, h, t] with eviction on, and the number of keys left at the ends of documents, summed
    over them and averaged over layers and heads."""
    _, _, aux = transformer.hidden(params, batch, cfg=cfg)
    return aux["evict_logits"], jnp.sum(jnp.mean(aux["occupancy"].astype(jnp.float32), axis=(0, 2)))


def _take(rows: Any) -> Batch:
    batch = next(rows)
    if batch.ids.shape[1] % BLOCK:
        raise AtomError(f"fit: rows of {batch.ids.shape[1]} tokens; expected a multiple of {BLOCK}")
    return batch
