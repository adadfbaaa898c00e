"""Generation, in which rows wait for each other (`atom_jax.models.quorum`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.kvcache.dense import Cache
from atom_jax.models import quorum, transformer
from atom_jax.models.bolmo.config import FUSED, BolmoConfig
from atom_jax.models.bolmo.forward import encode, linear, local
from atom_jax.models.bolmo.memory import BolmoState
from atom_jax.nn.attention import Tokens
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree
from atom_jax.tokenizers.suffix import advance
from atom_jax.typing import AtomError, Batch, Suffix


def step(p: Tree, batch: Batch, *, cfg: BolmoConfig, cache: Cache) -> tuple[jax.Array, Cache, jax.Array]:
    """Reads the next byte of every row; rows whose byte ends a patch wait until enough others do.

    Args:
      batch: [b, 1]. Ids from 260 on end patches. Segment 1 in rows that go on, 0 in rows that don't. Rows that wait
        have the id that they wait with.
      cache: of an earlier call. p: with the automaton's tables as "suffix" where the model has a table of subwords.
    Returns: states [b, 1, d], the cache, and ready bool [b]: rows that have been read to the end. Other states are
    meaningless. Of rows that go on at least one is ready; a single one is.
    """
    live, state = batch.segments[:, 0] > 0, cache.layers
    new = live & ~state.read
    h_b1d, encoder, suffix = _encode(p, batch, new, cfg, state)
    on = (state.read | new) & (batch.ids[:, 0] >= FUSED)
    run = quorum.met(on, live, enough(p, cfg, cache))
    ready = live & (run | ~on)
    newest, main = _patch(p, h_b1d, on & ready, run, cfg, state)
    here = Tokens(jnp.ones_like(batch.ids), ready[:, None].astype(jnp.int32))
    with jax.named_scope("decoder"):
        x_b1d, decoder = local(p["decoder"], newest + linear(p["residual"], h_b1d), here, state.decoder, cfg)
        x_b1d = rms_norm(x_b1d, p["norm"], cfg.main.norm_eps)
    state = BolmoState(encoder, decoder, main, newest, h_b1d, (state.read | new) & ~ready, suffix)
    return x_b1d, Cache(state, cache.length + new), ready


def enough(p: Tree, cfg: BolmoConfig, cache: Cache) -> int:
    """How many rows should wait, by what is read on both sides (weights and memory) and the share of bytes that there
    is room for."""
    state = cache.layers
    local = (p["encoder"], p["decoder"], p["unembed"], state.encoder, state.decoder)
    outer, inner = (sum(x.size for x in jax.tree.leaves(side)) for side in (local, (p["main"], state.main)))
    return quorum.size(len(cache.length), cfg.capacity, outer, inner)


def _encode(
    p: Tree, batch: Batch, new: jax.Array, cfg: BolmoConfig, state: BolmoState
) -> tuple[jax.Array, Any, jax.Array]:
    """Encoder states [b, 1, d], those of before in rows that aren't new; the encoder's memory; the automaton's."""
    suffix, found = state.suffix, None
    if cfg.subwords:
        if "suffix" not in p:
            raise AtomError("this model looks at the subword that ends at each byte: it needs its subword tokenizer")
        suffix = jnp.where(new, advance(p["suffix"], suffix, batch.ids[:, 0], jnp), suffix)
        found = Suffix(p["suffix"].out[suffix][:, None], suffix)
    # All of a row's states are empty before its first byte, so that no position has to say so.
    positions, segments = jnp.ones_like(batch.ids), new[:, None].astype(jnp.int32)
    with jax.named_scope("encoder"):
        h_b1d, encoder = encode(p, Batch(batch.ids, positions, segments, suffix=found), cfg, state.encoder)
    return jnp.where(new[:, None, None], h_b1d, state.h), encoder, suffix


def _patch(
    p: Tree, h_b1d: jax.Array, now: jax.Array, run: jax.Array, cfg: BolmoConfig, state: BolmoState
) -> tuple[jax.Array, Cache]:
    """The newest patches [b, 1, d], and the memory of the layers over patches, after the patches of rows `now`."""

    def inside(main: Cache) -> tuple[jax.Array, Cache]:
        units = Tokens(main.length[:, None], now[:, None].astype(jnp.int32))
        v_b1d, main, _ = transformer.blocks(p["main"], linear(p["pool"], h_b1d), units, cfg=cfg.blocks, cache=main)
        v_b1d = rms_norm(v_b1d, p["patch_norm"], cfg.edge_eps)
        return jnp.where(now[:, None, None], v_b1d, state.newest), main

    main = state.main.replace(fresh=False)
    with jax.named_scope("main"):
        return jax.lax.cond(run, inside, lambda main: (state.newest, main), main)
