"""From chunks back to positions: every position reads the chunk that its plan says it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.pooling import EPS, head_size
from atom_jax.chunking.segments import gather, read_chunks
from atom_jax.chunking.types import Plan, Tree
from atom_jax.nn.attention import attention_spec
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, normal, ones
from atom_jax.typing import AtomError


class Upsampler(NamedTuple):
    """apply(p, v_bmkd, h_btd, plan, z_bkd, *, cfg) -> y_btd; spec(cfg, d)."""

    apply: Callable[..., jax.Array]
    spec: Callable[[Chunking, int], Tree]


def carry(v_bmkd: jax.Array, plan: Plan, z_bkd: jax.Array) -> jax.Array:
    """The newest chunk's output after this call, for rows of one document: [b, k, d], z_bkd where there is none."""
    newest = jnp.minimum(plan.count, plan.at.shape[1]) - 1
    return read_chunks(v_bmkd, z_bkd.astype(v_bmkd.dtype), newest[:, None])[:, 0]


def _repeat(p: Tree, v_bmkd: jax.Array, h_btd: jax.Array, plan: Plan, z_bkd: jax.Array, *, cfg: Chunking):
    """The chunk's vector itself, for each of its readers (H-Net, Dynamic Token Pooling)."""
    v_bmd, z_bd = _one(v_bmkd, z_bkd, "repeat")
    return read_chunks(v_bmd, z_bd, plan.read)


def _cross_attention(p: Tree, v_bmkd: jax.Array, h_btd: jax.Array, plan: Plan, z_bkd: jax.Array, *, cfg: Chunking):
    """What a position finds in the k vectors of its chunk (Byte Latent Transformer, arXiv 2412.09871, 3.3.1): the
    attention's output alone, without a residual."""
    c = p["q"].shape[-1]
    q_btnc = project(rms_norm(h_btd, p["q_norm"], EPS), p["q"])

    def pairs(x: jax.Array) -> jax.Array:
        x = rms_norm(x, p["kv_norm"], EPS)
        return jnp.stack([project(x, p["k"]), project(x, p["v"])], axis=-2)

    kv = read_chunks(pairs(v_bmkd), pairs(z_bkd.astype(v_bmkd.dtype)), plan.read)
    k_btknc, v_btknc = kv[..., 0, :], kv[..., 1, :]
    scores = jnp.einsum("btnc,btknc->btnk", q_btnc, k_btknc, preferred_element_type=jnp.float32) * c**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(v_btknc.dtype)
    return project(jnp.einsum("btnk,btknc->btnc", weights, v_btknc), p["o"], inputs=2)


def _cross_attention_spec(cfg: Chunking, d: int) -> Tree:
    norms = {name: ParamSpec((d,), (None,), ones) for name in ("q_norm", "kv_norm")}
    return {**attention_spec(d, cfg.heads, cfg.heads, head_size(cfg, d), "none"), **norms}


def _slots(p: Tree, v_bmkd: jax.Array, h_btd: jax.Array, plan: Plan, z_bkd: jax.Array, *, cfg: Chunking):
    """The chunk's vector times the matrix of the position's place in its own chunk (MegaByte, arXiv 2305.07185);
    places from `max_positions` on share the last."""
    v_bmd, z_bd = _one(v_bmkd, z_bkd, "slots")
    b, m, d = v_bmd.shape
    width = cfg.max_positions
    x_bmd = jnp.concatenate([z_bd[:, None], v_bmd], axis=1)
    y = project(x_bmd, p["w"]).reshape(b, (m + 1) * width, d)
    return gather(y, (plan.read + 1) * width + jnp.minimum(plan.offset, width - 1))


def _slots_spec(cfg: Chunking, d: int) -> Tree:
    return {"w": ParamSpec((d, cfg.max_positions, d), ("embed", None, None), normal(d**-0.5))}


def _one(v_bmkd: jax.Array, z_bkd: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    if v_bmkd.shape[2] != 1:
        raise AtomError(f"upsample: {name!r} reads one vector per chunk, slots is {v_bmkd.shape[2]}")
    return v_bmkd[:, :, 0], z_bkd[:, 0].astype(v_bmkd.dtype)


UPSAMPLERS = {
    "repeat": Upsampler(_repeat, lambda cfg, d: {}),
    "cross_attention": Upsampler(_cross_attention, _cross_attention_spec),
    "slots": Upsampler(_slots, _slots_spec),
}
