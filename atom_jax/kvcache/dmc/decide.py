"""Decisions of tokens to merge, and the weights that they have in means (Nawrot et al., 2024)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.kvcache.dmc.config import Settings
from atom_jax.kvcache.dms.config import FEATURES
from atom_jax.kvcache.dms.observed import features
from atom_jax.kvcache.learned import project, shift, straight_through
from atom_jax.kvcache.policy import Heads, Mode
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.params import Tree

# Limits of a logarithm of a weight.
STEEPEST = 20.0


@struct.dataclass
class Said:
    """Of every token, f32 [b, h, t]: the logit z of merging, the weight w, and the logit e of eviction, or None."""

    z: jax.Array
    w: jax.Array
    e: Any = None

    @property
    def leaves(self) -> jax.Array:
        """f32 [b, h, t]: the logit of having no entry of its own."""
        return self.z if self.e is None else jnp.maximum(self.z, self.e)

    def weights(self, p_bht: jax.Array, tau: Any = None) -> jax.Array:
        """Weights in entries, f32 [b, h, t], of tokens that leave with probability p: one that is evicted has none.
        tau: temperature of what is relaxed."""
        if self.e is None:
            return self.w
        evicted = (self.e > self.z) if tau is None else jax.nn.sigmoid((self.e - self.z) / tau)
        return self.w * (1.0 - p_bht * evicted)


@struct.dataclass
class Decisions:
    """What one layer decided.

    p: f32 [b, h, t], the probability with which tokens merge (or are evicted); merges: bool [b, h, t], whether they
    do, and soft: f32 [b, h, t], 0 or 1 with the gradient of the probability. w: f32 [b, h, t], weights in entries.
    keep: f32 [b, h, t], added to the scores of the entry of the token at t by queries after it; None: all stay.
    """

    p: jax.Array
    w: jax.Array
    merges: jax.Array
    soft: jax.Array
    keep: Any


def say(p: Tree, heads: Heads, cfg: Settings) -> Said:
    """What every token says of itself."""
    if cfg.form == "borrowed":
        h = heads.k_bthk.shape[2]
        z = heads.k_bthk[..., -1].astype(jnp.float32).transpose(0, 2, 1) - cfg.offset
        q = heads.q_btnk[..., -1].astype(jnp.float32)
        mean = q.reshape(*q.shape[:2], h, -1).mean(-1).transpose(0, 2, 1)
        # As in the released code: a weight is never 0.
        return Said(z, jax.nn.sigmoid(mean + cfg.offset) + float(jnp.finfo(heads.q_btnk.dtype).eps))

    def logit(name: str, bias: str) -> jax.Array:
        return project(heads, p["norm"], p[name], p[bias] if cfg.bias else None) * cfg.scale - cfg.offset

    # Of the form observed, without what attention says.
    weight = jnp.exp(jnp.clip(project(heads, p["norm"], p["weight"]), -STEEPEST, STEEPEST))
    return Said(logit("alpha", "bias"), weight, logit("evict", "evict_bias") if cfg.evicts else None)


def observed(said: Said, stats_bhtf: jax.Array | None, p: Tree, cfg: Settings) -> Said:
    """What is known of tokens that are no longer among the newest: of the form observed, with the attention that they
    received meanwhile, f32 [b, h, t, 3] as of `dms.observed.received`."""
    if cfg.form != "observed":
        return said
    seen = features(*(stats_bhtf[..., i] for i in range(FEATURES)))
    more = {
        name: jnp.einsum("bhtf,fh->bht", seen, p[f"{name}_observed"].astype(jnp.float32)) for name in cfg.predicted
    }
    weight = said.w * jnp.exp(jnp.clip(more["weight"], -STEEPEST, STEEPEST))
    e = said.e + more["evict"] * cfg.scale if cfg.evicts else None
    return Said(said.z + more["alpha"] * cfg.scale, weight, e)


def lend(x: jax.Array, cfg: Settings, fade: Any = None) -> jax.Array:
    """Queries or keys [..., k] whose borrowed channel is set to `fade` times itself (None: to 0), before RoPE and
    again after it."""
    if cfg.form != "borrowed":
        return x
    return x.at[..., -1].multiply(jnp.asarray(0.0 if fade is None else fade, x.dtype))


def merges(z_bht: jax.Array, tokens: Tokens, cfg: Settings) -> jax.Array:
    """bool [b, h, t]: the tokens that merge; a sink is no entry to merge into, and a text begins with one of its
    own."""
    return (z_bht > 0) & _may(tokens, cfg)


def _may(tokens: Tokens, cfg: Settings) -> jax.Array:
    return ((tokens.positions > cfg.sinks) & (tokens.segments > 0))[:, None]


def decide(said: Said, tokens: Tokens, cfg: Settings, mode: Mode) -> Decisions:
    """Decisions of all tokens of a pass without a cache."""
    if mode.kind in ("off", "given"):
        none = jnp.zeros_like(said.z)
        return Decisions(none, said.w, none > 0, none, mode.noise if mode.kind == "given" else None)
    if mode.kind == "hard":
        chosen = merges(said.leaves, tokens, cfg)
        p = chosen.astype(jnp.float32)
        return Decisions(p, said.weights(p), chosen, p, jnp.where(shift(chosen, False), NEGATIVE, 0.0))
    tau = cfg.tau if mode.cool is None else cfg.tau * mode.cool
    z, may = (said.leaves + (0.0 if mode.noise is None else mode.noise)) / tau, _may(tokens, cfg)
    chosen, p = merges(z, tokens, cfg), jnp.where(may, jax.nn.sigmoid(z), 0.0)
    keep = jnp.where(may, jax.nn.log_sigmoid(-z), 0.0)
    return Decisions(
        p, said.weights(p, tau), chosen, straight_through(p, chosen.astype(jnp.float32)), shift(keep, 0.0)
    )
