"""Bytes, or other ids, by the fields of `HNetConfig`: vocab_size, ngrams, tie_embeddings, head_bias."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking import hashing
from atom_jax.chunking.types import END
from atom_jax.nn.attention import Tokens
from atom_jax.nn.conv import remember
from atom_jax.nn.embedding import lookup
from atom_jax.params import ParamSpec, Tree, normal, zeros
from atom_jax.sharding import constrain
from atom_jax.typing import Batch


@config.register
@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes, or other ids, in and their logits out."""


def spec(cfg: Any) -> Tree:
    """The tables: embed, ngrams, unembed and unembed_bias, as far as an `HNetConfig` has them."""
    d = cfg.d_model[0]
    tree: Tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), normal(1.0 if not cfg.tie_embeddings else 0.02))
    }
    if not cfg.tie_embeddings:
        tree["unembed"] = ParamSpec((d, cfg.vocab_size), ("embed", "vocab"), normal(0.02))
    if cfg.ngrams:
        shape = (len(cfg.ngrams), cfg.ngram_rows, d)
        tree["ngrams"] = ParamSpec(shape, (None, "vocab", "embed"), normal(0.02))
    if cfg.head_bias:
        tree["unembed_bias"] = ParamSpec((cfg.vocab_size,), ("vocab",), zeros)
    return tree


def empty(cfg: Any, b: int) -> jax.Array:
    """What is kept of what b rows have read before their first id: the latest ids i32 [b, n], for n-grams."""
    return jnp.zeros((b, max(cfg.ngrams, default=1) - 1), jnp.int32)


def inlet(
    p: Tree, batch: Batch, tokens: Tokens, before: jax.Array | None, cfg: Any
) -> tuple[jax.Array, jax.Array | None, None]:
    """Embeddings [b, t, d] of ids and of the n-grams that end at them, and the latest ids after them.

    tokens: where they stand, padding where they were read before. before: the latest ids of earlier calls, or None.
    """
    x_btd = constrain(lookup(p["embed"], batch.ids, cfg.dtype), "batch", None, None)
    if cfg.ngrams:
        x_btd += _ngrams(p["ngrams"], batch.ids, tokens, before, cfg)
    return x_btd, None if before is None else remember(batch.ids, tokens, before), None


def outlet(p: Tree, x_btd: jax.Array, cfg: Any) -> jax.Array:
    """Logits float32 [b, t, v] of final states."""
    table = p["unembed"] if "unembed" in p else p["embed"].T
    out = jnp.einsum("btd,dv->btv", x_btd, table.astype(x_btd.dtype), preferred_element_type=jnp.float32)
    if cfg.head_bias:
        out += jnp.broadcast_to(p["unembed_bias"].astype(jnp.float32), out.shape)
    return constrain(out, "batch", None, "vocab")


def operations(cfg: Any) -> float:
    """Of the logits, per position."""
    return 2.0 * cfg.d_model[0] * cfg.vocab_size


def describe(cfg: Any) -> str:
    """The vocabulary in words."""
    tied, grams = "tied" if cfg.tie_embeddings else "separate", ", ".join(map(str, cfg.ngrams))
    extra = f", {cfg.ngram_rows:,} rows for n-grams of each length in {grams}" if grams else ""
    return f"{cfg.vocab_size:,}, {tied} output embedding{extra}"


def metrics(mark_bt: jax.Array, batch: Batch, kind: str) -> dict[str, jax.Array]:
    """at_word_edge and at_character_edge: of the units that begin at a mark ("start") or after it ("end"), those that
    begin at the edge of a word, which is at or after white space, and with a whole UTF-8 character; f32 [2] each,
    with the number of all."""
    ids_bt = batch.ids
    space = (ids_bt == 0x20) | ((ids_bt >= 0x09) & (ids_bt <= 0x0D))
    inside = (ids_bt >= 0x80) & (ids_bt < 0xC0)
    if kind == END:
        beside, whole = jnp.roll(space, -1, axis=1), ~jnp.roll(inside, -1, axis=1)
    else:
        beside, whole = jnp.roll(space, 1, axis=1), ~inside
    total = jnp.sum(mark_bt, dtype=jnp.float32)
    hits = (jnp.sum(mark_bt & at, dtype=jnp.float32) for at in (space | beside, whole))
    return {name: jnp.stack([n, total]) for name, n in zip(("at_word_edge", "at_character_edge"), hits)}


def _ngrams(table_nvd: jax.Array, ids_bt: jax.Array, tokens: Tokens, before: jax.Array | None, cfg: Any):
    """The sum of the embeddings of the n-grams that end at each position: [b, t, d]."""
    rows = [hashing.hashed(ids_bt, tokens, n, 0, cfg.ngram_rows, before) for n in cfg.ngrams]
    flat = table_nvd.reshape(-1, table_nvd.shape[-1]).astype(cfg.dtype)
    index_btn = jnp.stack([i * cfg.ngram_rows + r for i, r in enumerate(rows)], axis=-1)
    return jnp.sum(jnp.take(flat, index_btn, axis=0), axis=2)
