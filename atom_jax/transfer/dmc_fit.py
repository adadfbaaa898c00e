"""Merging fitted in closed form, without training: ridge regressions on what the dense model loses where two tokens
share an entry.

For every layer, key/value head and token, two numbers are predicted from the normalised residual stream at the token
and, of the form observed, from the attention that it received while it was among the newest. The first is the
logarithm of the error of attention's outputs if this token, and nothing else, were merged with the one before it
(`costs`); it is merged where that is under one threshold for all layers and heads. The second is the logarithm of the
attention that the token receives, its weight in the mean: values averaged by the attention that they get change the
output least. Both count the queries that would see the mean: those that stand `window` tokens or more after it. Where
tokens may be evicted, too, a third is the logarithm of the error if the token alone were; it leaves where the lesser
of both errors is under the threshold, in the way of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dmc import DMC, serve
from atom_jax.kvcache.dmc.decide import Said
from atom_jax.kvcache.dmc.pooling import pooled
from atom_jax.kvcache.dms import observed
from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.policy import Mode
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import NEGATIVE, Tokens
from atom_jax.nn.blockwise import blockwise_lse
from atom_jax.nn.norm import rms_norm
from atom_jax.transfer import ridge
from atom_jax.transfer.ridge import BLOCK, LEAST_QUERIES, FitConfig
from atom_jax.typing import AtomError, Batch

# Added to errors, relative to the residual stream of the query, and to attention, before their logarithms.
ERROR_FLOOR, ATTENTION_FLOOR = 1e-9, 1e-6


def fit(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """Parameters whose decisions and weights are fitted; the others are as they were.

    rows: at least `windows` + 3 `calibration` batches [1, t] of one length, with one document or several. Raises
    AtomError for a model without projections to fit, or documents that are too short.
    """
    dmc = cfg.memory
    if not isinstance(dmc, DMC) or dmc.form == "borrowed" or not dmc.bias:
        raise AtomError("fit: the model's memory must be dmc of the form adapter or observed, with bias=true")
    if how.target != "output":
        raise AtomError(f"fit.target: merging is fitted to output, got {how.target!r}")
    rows = iter(rows)
    found = ridge.gathered(lambda batch, _: sums(params, batch, cfg=cfg), rows, cfg, how, say)
    if found is not None:
        params = put(params, found, cfg, how)
    return calibrate(params, cfg, rows, how, say)


def calibrate(
    params: Any,
    cfg: TransformerConfig,
    rows: Iterable[Batch],
    how: FitConfig,
    say: Callable[[str], None] = print,
) -> Any:
    """See `ridge.calibrate`."""

    def shifted(params: Any, move: float) -> Any:
        learned = params["layers"]["attn"]["dmc"]
        moved = {name: learned[name] + move / cfg.memory.scale for name in cfg.memory.biases}
        return ridge.learned(params, cfg, moved)

    return ridge.calibrate(params, cfg, rows, how, say, cfg.memory.sinks + 1, cfg.memory.window, shifted)


def put(params: Any, found: dict[str, np.ndarray], cfg: TransformerConfig, how: FitConfig) -> Any:
    """Parameters whose decision logits are minus the predicted errors, times the steepness, and whose weights are the
    predicted attention, from the `sums`."""
    dmc, new = cfg.memory, {}
    bias = dict(zip(("alpha", "evict"), dmc.biases))
    for name in dmc.predicted:
        weights, constant, seen = ridge.solve({**found, "xy": found[f"x{name}"], "oy": found[f"o{name}"]}, how.ridge)
        s = 1.0 if name == "weight" else -how.steepness / dmc.scale
        new[name] = s * weights
        if name in bias:
            new[bias[name]] = s * constant + dmc.offset / dmc.scale
        if dmc.form == "observed":
            new[f"{name}_observed"] = s * seen
    return ridge.learned(params, cfg, {name: jnp.asarray(x, jnp.float32) for name, x in new.items()})


@jax.jit(static_argnames="cfg")
def sums(params: Any, batch: Batch, *, cfg: TransformerConfig) -> dict[str, jax.Array]:
    """What `ridge.solve` needs for the predictions, by the names of `Settings.predicted`."""
    tokens = Tokens(batch.positions, batch.segments)
    counts = (batch.positions > cfg.memory.sinks) & (tokens.left >= cfg.memory.window + LEAST_QUERIES)
    counts = counts.astype(jnp.float32)

    def probe(p, heads, call):
        x = rms_norm(heads.x_btd, p["dmc"]["norm"], cfg.norm_eps).astype(jnp.float32)
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) * counts[..., None]
        # Some tokens, the first above all, have a residual stream that is larger than others' by orders of magnitude.
        size = jnp.square(heads.x_btd.astype(jnp.float32)).sum(-1)
        merged, evicted, weight = costs(call, p["o"], size, cfg.memory)
        merged, evicted = (jnp.log(x + ERROR_FLOOR) for x in (merged, evicted))
        targets = {"alpha": merged, "weight": weight, "evict": evicted}
        if cfg.memory.form == "observed":
            o = observed.observe(call.q, call.k, tokens, cfg.memory.window - 1) * counts[:, None, :, None]
        else:
            o = jnp.zeros((*weight.shape, 0))
        out = {"xx": jnp.einsum("btd,bte->de", x, x), "xo": jnp.einsum("btd,bhtf->hdf", x, o)}
        out["oo"] = jnp.einsum("bhtf,bhtg->hfg", o, o)
        for name in cfg.memory.predicted:
            y = targets[name]
            out |= {f"x{name}": jnp.einsum("btd,bht->hd", x, y), f"o{name}": jnp.einsum("bhtf,bht->hf", o, y)}
        return out

    return transformer.hidden(params, batch, cfg=cfg, mode=Mode("off"), probe=probe)[2]["probe"]


def costs(call: Call, o_nkd: jax.Array, size_bt: jax.Array, dmc: DMC) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For every token, f32 [b, h, t]: the squared error of attention's contributions to the residual stream, summed
    over the group's heads and all queries `dmc.window` tokens or more after it, if it alone were merged with the one
    before it; the same if it alone were evicted; and the log of the attention that it receives from these queries
    (without a window, from those after its own), on average.

    o_nkd: the output projection. size_bt: what the error of each query is divided by. The entry of two is what `dmc`
    makes of tokens whose weights are the attention that they receive.
    """
    q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    (b, h, g, t, size), scale = q.shape, q.shape[-1] ** -0.5
    places = (call.tokens.positions, call.tokens.segments) * 2
    out, lse = blockwise_lse(q, k, v, places, None, True, min(t, BLOCK))
    received = _attention(q, k, lse, call.tokens, max(dmc.window, 1))
    before = lambda x: jnp.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2)  # noqa: E731
    weight = received + ATTENTION_FLOOR
    merging = call.replace(said=Said(weight, weight), mode=Mode("off"))
    pairs = pooled(serve.tokens(jnp.ones_like(weight), weight, merging, dmc), 2)
    share = weight / pairs.c
    k_new, _, bias = serve.seen(pairs, merging, dmc)
    bias = jnp.zeros((1, 1, 1, 1, 1)) if bias is None else bias[:, :, None, None]
    k_new = k_new.astype(jnp.float32)
    # Inner products as the residual stream has them.
    o = o_nkd.astype(jnp.float32).reshape(h, g, size, -1)
    metric = jnp.einsum("hgkd,hgld->hgkl", o, o)
    v_there = jnp.einsum("hgkl,bhsl->bhgsk", metric, v)
    v_v, v_last = (jnp.einsum("bhgsk,bhsk->bhgs", v_there, x) for x in (v, before(v)))

    def some(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 3)  # noqa: E731
        q_i, out_i, lse_i = cut(q), cut(out.astype(jnp.float32)), cut(lse)[..., None]
        # Without a window, the token's own query sees what it became.
        seen = jnp.broadcast_to(_after(call.tokens, i, dmc.window)[:, None, None], (b, h, g, BLOCK, t))
        attend = lambda k: jnp.einsum("bhgtk,bhsk->bhgts", q_i, k) * scale - lse_i  # noqa: E731
        p = jnp.exp(jnp.where(seen, attend(k), NEGATIVE))
        p_new = jnp.exp(jnp.where(seen, attend(k_new) + bias, NEGATIVE))
        last = lambda x: jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)  # noqa: E731
        u = share[:, :, None, None]
        p_last = jnp.where(seen, last(p), 0.0)
        left = jnp.maximum(1.0 - p - p_last + p_new, 1e-6)
        x_out, x_last, x_own = 1.0 - left, p_new * (1.0 - u) - p_last, p_new * u - p
        out_v = jnp.einsum("bhgtk,bhgsk->bhgts", out_i, v_there)
        out_out = jnp.einsum("bhgtk,hgkl,bhgtl->bhgt", out_i, metric, out_i)[..., None]
        vv = v_v[:, :, :, None]
        error = x_out**2 * out_out + x_last**2 * last(vv) + x_own**2 * vv
        error += 2.0 * x_out * (x_last * last(out_v) + x_own * out_v) + 2.0 * x_last * x_own * v_last[:, :, :, None]
        alone = jnp.square(p / jnp.maximum(1.0 - p, 1e-6)) * (out_out - 2.0 * out_v + vv)
        size_i = jax.lax.dynamic_slice_in_dim(size_bt, i * BLOCK, BLOCK, 1)[:, None, None, :, None]
        total = lambda x: jnp.sum(jnp.where(seen, jnp.maximum(x, 0.0), 0.0) / size_i, axis=(2, 3))  # noqa: E731
        return total(error / left**2), total(alone)

    merged, evicted = (x.sum(0) for x in jax.lax.map(some, jnp.arange(t // BLOCK)))
    return merged, evicted, jnp.log(weight)


def _after(tokens: Tokens, i: jax.Array, least: int) -> jax.Array:
    """bool [b, BLOCK, t]: whether the queries of block i stand at least so many tokens after the keys of their own
    documents."""
    here = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 1)[:, :, None], tokens)
    same = here.segments == tokens.segments[:, None]
    return same & (here.positions - tokens.positions[:, None] >= least)


def _attention(q: jax.Array, k: jax.Array, lse: jax.Array, tokens: Tokens, least: int) -> jax.Array:
    """Attention f32 [b, h, t] that every key receives from queries at least so many tokens after it, per query."""
    t, scale = k.shape[2], q.shape[-1] ** -0.5

    def some(i: jax.Array) -> jax.Array:
        q_i, lse_i = (jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 3) for x in (q, lse))
        scores = jnp.einsum("bhgtk,bhsk->bhgts", q_i, k) * scale - lse_i[..., None]
        seen = jnp.broadcast_to(_after(tokens, i, least)[:, None, None], scores.shape)
        return jnp.exp(jnp.where(seen, scores, NEGATIVE)).sum((2, 3))

    received = jax.lax.map(some, jnp.arange(t // BLOCK)).sum(0)
    return received / jnp.maximum(tokens.left - least + 1, 1)[:, None]
