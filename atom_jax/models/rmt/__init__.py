"""Recurrent memory transformers (Bulatov et al., 2022): a transformer reads a text segment by segment, and hands
a few vectors on from each to the next."""

from atom_jax.models.rmt.config import RMTConfig, roomier, spec
from atom_jax.models.rmt.family import FAMILY
from atom_jax.models.rmt.forward import apply, decode_params, hidden, init_cache, logits, step

__all__ = [
    "FAMILY", "RMTConfig", "apply", "decode_params", "hidden", "init_cache", "logits", "roomier", "spec", "step"
]  # fmt: skip
