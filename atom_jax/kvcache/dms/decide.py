"""Decision logits, their relaxation, and the log-probability with which keys stay (Łańcucki et al., 2025)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache import separators
from atom_jax.kvcache.dms.config import Settings
from atom_jax.kvcache.dms.observed import observe
from atom_jax.kvcache.learned import project, shift, straight_through
from atom_jax.kvcache.policy import Heads, Mode
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.params import Tree

# A logit beyond doubt.
SURE = 1000.0


@struct.dataclass
class Decisions:
    """What one layer decided.

    keep: f32 [b, h, t], added to the scores of the key at t by queries beyond the window; None: all stay.
    evict: bool [b, h, t], whether the key at t is evicted (`observed`: of keys still in the window, as it looks so
    far). soft: f32 [b, h, t], the decisions made at t, 0 or 1 with the gradient of their probabilities. z: f32
    [b, h, t], the logits of the keys at t. evidence: f32 [b, t, c], about every key, for the layer above, or None.
    """

    keep: Any
    evict: jax.Array
    soft: jax.Array
    z: jax.Array
    evidence: Any = None


def logits(p: Tree, heads: Heads, cfg: Settings) -> jax.Array:
    """Decision logits of every token, float32 [b, h, t]: they speak of the token before, those of the form separators
    of the token itself. Of the observed form, the part that does not depend on attention."""
    b, t, h, _ = heads.k_bthk.shape
    if cfg.form == "all":
        return jnp.full((b, h, t), -SURE)
    if cfg.form == "separators":
        stays = separators.are(heads.ids, cfg.separators, "dms:form=separators")
        z = jnp.where(stays, -SURE, SURE)[:, None]
        return jnp.broadcast_to(z, (z.shape[0], h, z.shape[2]))
    if cfg.form == "borrowed":
        z = heads.q_btnk[:, :, :: heads.q_btnk.shape[2] // h, -1].astype(jnp.float32).transpose(0, 2, 1)
    else:
        z = project(heads, p["norm"], p["alpha"], p["bias"] if cfg.bias else None)
        if cfg.beyond:
            doublings = jnp.log2(jnp.maximum(heads.tokens.positions / cfg.beyond, 1.0))
            z += doublings[:, None] * p["slope"].astype(jnp.float32)[None, :, None]
    return z * cfg.scale - cfg.offset


def lend(q_btnk: jax.Array, h: int, fade: Any = None) -> jax.Array:
    """Queries whose borrowed channel is set to `fade` times itself (None: to 0), before RoPE and again after it."""
    n, size = q_btnk.shape[2:]
    borrowed = ((jnp.arange(n) % (n // h)) == 0)[:, None] & (jnp.arange(size) == size - 1)[None]
    factor = jnp.where(borrowed, 0.0 if fade is None else fade, 1.0).astype(q_btnk.dtype)
    return q_btnk * factor[None, None]


def from_observed(
    p: Tree, seen_bhtf: jax.Array, evidence_btc: Any, cfg: Settings
) -> tuple[jax.Array, jax.Array | None]:
    """The part of the logits that attention contributes, float32 [b, h, t], and the evidence about these keys with
    what is seen here; seen_bhtf: features of `observed`. evidence_btc: f32, of the layers below, or None."""
    p = {name: p[name].astype(jnp.float32) for name in ("observed", "tell", "hear") if name in p}
    z = jnp.einsum("bhtf,fh->bht", seen_bhtf, p["observed"])
    if evidence_btc is not None:
        seen_bhtf = jnp.concatenate([seen_bhtf, jnp.ones_like(seen_bhtf[..., :1])], axis=-1)
        evidence_btc = evidence_btc + jnp.einsum("bhtf,fhc->btc", seen_bhtf, p["tell"])
        z += jnp.einsum("btc,ch->bht", evidence_btc, p["hear"])
    return z * cfg.scale, evidence_btc


def decide(
    p: Tree, z_bht: jax.Array, q_bhgtk: jax.Array, k_bhtk: jax.Array, tokens: Tokens, cfg: Settings, mode: Mode,
    evidence_btc: Any = None,
) -> Decisions:  # fmt: skip
    """Decisions about all keys of a pass without a cache.

    z_bht: from `logits`. q_bhgtk, k_bhtk: after RoPE, for the observed form. evidence_btc: of the layers below.
    """
    relaxed = mode.kind == "relaxed"
    noise = 0.0 if not relaxed or mode.noise is None else mode.noise
    tau = cfg.tau if mode.cool is None else cfg.tau * mode.cool
    if cfg.form == "observed":
        seen = jax.lax.stop_gradient(observe(q_bhgtk, k_bhtk, tokens, cfg.window))
        more, evidence_btc = from_observed(p, seen, evidence_btc, cfg)
        z = agreed(shift(z_bht, -1e9) + more, cfg)
        said = agreed((z + noise) / tau, cfg) if relaxed else z
        of_key = said
    elif not cfg.late:
        z = said = of_key = z_bht
    else:
        said = agreed((z_bht + noise) / tau if relaxed else z_bht, cfg)
        z, of_key = agreed(shift(z_bht, -1e9), cfg), shift(said, 0.0 if relaxed else -1e9)
    sink = (tokens.positions < cfg.sinks)[:, None]
    evict = (of_key > 0) & ~sink
    hard = (said > 0).astype(jnp.float32)
    if mode.kind == "off":
        return Decisions(None, jnp.zeros_like(evict), jnp.zeros_like(hard), z, evidence_btc)
    if mode.kind == "given":
        return Decisions(mode.noise, jnp.zeros_like(evict), jnp.zeros_like(hard), z, evidence_btc)
    if not relaxed:
        return Decisions(jnp.where(evict, NEGATIVE, 0.0), evict, hard, z, evidence_btc)
    soft = jax.nn.sigmoid(said)
    keep = jnp.where(sink, 0.0, jax.nn.log_sigmoid(-of_key))
    return Decisions(keep, evict, straight_through(soft, hard), z, evidence_btc)


def agreed(z_bht: jax.Array, cfg: Settings) -> jax.Array:
    """The logits by which heads decide, as `Settings.per` says."""
    if cfg.per == "head":
        return z_bht
    one = z_bht[:, :1] if cfg.per == "layer" else z_bht.mean(1, keepdims=True)
    return jnp.broadcast_to(one, z_bht.shape)


def occupancy(evict_bht: jax.Array, tokens: Tokens, window: int) -> jax.Array:
    """i32 [b, h]: keys left once the last token of every document was read: those not evicted, and those in its
    window; of rows with several documents, the sum."""
    left = ~evict_bht | (tokens.left <= window)[:, None]
    return jnp.sum(left & (tokens.segments > 0)[:, None], axis=2, dtype=jnp.int32)
