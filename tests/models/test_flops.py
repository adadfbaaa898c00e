"""Operation counts against XLA's own."""

import dataclasses

import jax
import pytest
from jax import numpy as jnp

from atom_jax import params
from atom_jax.models import hnet, registry, transformer
from atom_jax.models.hnet import chunking
from atom_jax.typing import Batch

TRANSFORMER = transformer.TransformerConfig(d_model=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128)
HNET = hnet.HNetConfig(
    layout=("T1", "T1", "T1"), d_model=(64, 128), d_intermediate=(128, 256), n_heads=(2, 2), rotary_dim=(16, 16),
    window=(-1, -1), chunking=(chunking(4.0, 0.25),),
)  # fmt: skip


@pytest.mark.parametrize("cfg", [TRANSFORMER, HNET], ids=["transformer", "hnet"])
def test_operations_are_those_that_xla_counts(cfg):
    length = 32  # short: attention is one tile, so XLA counts scores above the diagonal too, a few percent
    row = jnp.zeros((1, length), jnp.int32)
    batch = Batch(row, jnp.arange(length, dtype=jnp.int32)[None], jnp.ones_like(row))
    p = params.abstract(registry.of(cfg).spec(cfg))
    compiled = jax.jit(lambda p: registry.of(cfg).apply(p, batch, cfg=cfg)[0].logits).lower(p).compile()
    theirs = compiled.cost_analysis()["flops"] / length
    assert 0.9 < registry.of(cfg).flops(cfg, length) / theirs < 1.02


def test_units_cost_what_their_slots_cost():
    half = registry.of(HNET).flops(HNET, 64)
    wide = dataclasses.replace(HNET, chunking=(dataclasses.replace(HNET.chunking[0], capacity=0.5),))
    inner = params.count(registry.of(HNET).spec(HNET)["stage1"])
    # A quarter of a slot more per position: its matrices, and attention among the chunks.
    assert 0.25 * 2 * inner * 0.95 < registry.of(wide).flops(wide, 64) - half < 0.25 * 2 * inner * 1.1
