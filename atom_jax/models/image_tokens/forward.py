"""Encoder and decoder of image tokens: transformers over [patches | registers] and [queries | registers].

Letters besides those of `atom_jax.typing`: p patches of an image, c numbers of a patch, r registers, z numbers of a
register's code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.models.image_tokens.quantise import Quantised
from atom_jax.nn import vit
from atom_jax.nn.attention import Tokens
from atom_jax.params import Tree


def states(
    p: Tree, x_bpc: jax.Array, cfg: Any, keep_br: jax.Array | None = None, front_bd: jax.Array | None = None
) -> jax.Array:
    """What the encoder makes of the registers, [b, r, d], before the last norm.

    Args:
      x_bpc: patches (`vit.patches`), of numbers in [0, 1].
      keep_br: bool, registers that exist, None: all. Those of tokenizers whose encoder is told of it all do, and know
        which of them are kept.
      front_bd: one more vector that all see.
    """
    e = p["encoder"]
    x_bpd = vit.affine(e["patch"], x_bpc.astype(cfg.dtype))
    x_bpd = x_bpd + jnp.broadcast_to(e["positions"].astype(x_bpd.dtype), x_bpd.shape)
    b, r = x_bpd.shape[0], e["registers"].shape[0]
    registers = jnp.broadcast_to(e["registers"].astype(x_bpd.dtype), (b, *e["registers"].shape))
    if "told" in e:
        kept = jnp.ones((b, r), jnp.int32) if keep_br is None else keep_br.astype(jnp.int32)
        registers, keep_br = registers + jnp.take(e["told"], kept, axis=0).astype(x_bpd.dtype), None
    front = [] if front_bd is None else [front_bd[:, None].astype(x_bpd.dtype)]
    x_btd = jnp.concatenate([*front, x_bpd, registers], axis=1)
    tokens = places(x_btd.shape[1] - r, registers.shape[:2], keep_br, cfg.mask == "causal_registers")
    return vit.blocks(e["blocks"], vit.norm(e["first_norm"], x_btd, cfg.norm_eps), tokens, cfg.norm_eps)[:, -r:]


def latents(p: Tree, x_brd: jax.Array, cfg: Any) -> jax.Array:
    """Vectors [b, r, z] of the registers' states, to be quantised."""
    e = p["encoder"]
    return vit.affine(e["outlet"], vit.norm(e["last_norm"], x_brd, cfg.norm_eps)).astype(jnp.float32)


def encode(p: Tree, x_bpc: jax.Array, cfg: Any, keep_br: jax.Array | None = None) -> jax.Array:
    """Vectors f32 [b, r, z] of the registers, before they are quantised; see `states`."""
    return latents(p, states(p, x_bpc, cfg, keep_br), cfg)


def quantise(p: Tree, z_brz: jax.Array, cfg: Any) -> Quantised:
    """Codes of vectors."""
    return cfg.quantiser(p.get("quantiser", {}), z_brz)


def decode(p: Tree, z_brz: jax.Array, keep_br: jax.Array, cfg: Any) -> jax.Array:
    """Patches f32 [b, p, c] of quantised vectors, from those that are kept and nothing else.

    keep_br: bool. The others are not seen, or seen as one learned vector, or as zeros (`cfg.length.dropped`).
    """
    d, r = p["decoder"], z_brz.shape[1]
    if cfg.length.dropped != "mask":
        z_brz, keep_br = replaced(z_brz, keep_br, d.get("dropped", jnp.zeros(z_brz.shape[-1]))), None
    x_brd = vit.affine(d["inlet"], z_brz.astype(cfg.dtype))
    x_brd = x_brd + jnp.broadcast_to(d["registers"][:r].astype(x_brd.dtype), x_brd.shape)
    queries = jnp.broadcast_to(queries_of(d).astype(x_brd.dtype), (len(x_brd), *d["positions"].shape))
    x_btd = jnp.concatenate([queries, x_brd], axis=1)
    tokens = places(queries.shape[1], x_brd.shape[:2], keep_br, causal=False)
    x_btd = vit.blocks(d["blocks"], vit.norm(d["first_norm"], x_btd, cfg.norm_eps), tokens, cfg.norm_eps)
    x_bpd = vit.norm(d["last_norm"], x_btd[:, "class" in d : queries.shape[1]], cfg.norm_eps)
    return vit.affine(d["down"], jnp.tanh(vit.affine(d["up"], x_bpd))).astype(jnp.float32)


def image(p: Tree, index_br: jax.Array, cfg: Any) -> jax.Array:
    """Images f32 [b, size, size, channels] of codes i32 [b, r], -1 for tokens that are not kept."""
    z_brz = cfg.quantiser.vectors(p.get("quantiser", {}), jnp.maximum(index_br, 0))
    return pictured(decode(p, z_brz, index_br >= 0, cfg), cfg)


def pictured(x_bpc: jax.Array, cfg: Any) -> jax.Array:
    """Images [b, size, size, channels] in [0, 1] of patches."""
    return jnp.clip(vit.unpatched(x_bpc, cfg.patch, cfg.size, cfg.size), 0.0, 1.0)


def replaced(z_brz: jax.Array, keep_br: jax.Array, instead_z: jax.Array) -> jax.Array:
    """Vectors, with another one in place of those that are not kept."""
    kept = jnp.broadcast_to(keep_br[..., None], z_brz.shape)
    return jnp.where(kept, z_brz, jnp.broadcast_to(instead_z.astype(z_brz.dtype), z_brz.shape))


def queries_of(d: Tree) -> jax.Array:
    """What the decoder begins with in place of the patches, [p, d]; before it a class token, where there is one."""
    positions = d["positions"]
    masks = jnp.broadcast_to(d["mask"], positions.shape)
    return positions + (masks.at[0].set(d["class"]) if "class" in d else masks)


def places(p: int, rows: tuple[int, int], keep_br: jax.Array | None, causal: bool) -> Tokens:
    """Where p patches and the registers [b, r] after them stand. All see what is kept. causal: but patches see
    patches alone, and a register no later one."""
    b, r = rows
    after = jnp.arange(1, r + 1, dtype=jnp.int32) if causal else jnp.zeros(r, jnp.int32)
    positions = jnp.concatenate([jnp.zeros(p, jnp.int32), after])
    keep = jnp.ones((b, r), bool) if keep_br is None else keep_br
    segments = jnp.concatenate([jnp.ones((b, p), jnp.int32), keep.astype(jnp.int32)], axis=1)
    return Tokens(jnp.broadcast_to(positions[None], (b, p + r)), segments)
