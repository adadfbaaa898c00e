"""The tiny models of the official code, until configuration files say everything."""

import json
import pathlib

import jax.numpy as jnp
from safetensors.numpy import load_file

from atom_jax.checkpoint import families
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.kvcache.dms import DMS
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import Batch

VARIANTS = ("borrowed_neuron", "separate_alpha", "separate_alpha_per_layer")


def load(directory: pathlib.Path):
    """(configuration, parameters, numbers of the official code) of one variant."""
    data = json.loads((directory / "config.json").read_text())
    form = "adapter" if data["dms_separate_alpha"] else "borrowed"
    cfg = TransformerConfig(
        family="qwen3", vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128,
        norm_eps=1e-6, tie_embeddings=False, max_length=256,
        memory=DMS(form=form, window=data["dms_window_size"], per=data["dms_alpha_per"]),
    )  # fmt: skip
    params = families.load(SafetensorsSource(directory), cfg)
    return cfg, params, load_file(directory / "train.safetensors")


def batch(ids) -> Batch:
    """Whole rows of one document."""
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    return Batch(ids, positions, jnp.ones_like(ids))
