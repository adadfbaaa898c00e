"""Models that choose their own units: the recursion of H-Net (Hwang et al., 2025) over any boundary rule and pool.

Stage 0 works on bytes. An encoder reads them, a rule decides where units begin or end, a pool makes one vector of
each unit, the next stage runs over the units, and what it returns is spread over the bytes again for the decoder:

    encoder -> rule -> plan -> pool -> next stage -> mix -> upsample (+ residual) -> decoder

With the cosine router, pool "first" and EMA mixing this is H-Net as released; other choices give dynamic token
pooling, MAGNET, MegaByte, BLT-like and word models (`configs/units.py`).
"""

from atom_jax.models.hnet.config import HNetConfig, chunking, read_whole, roomier, spec
from atom_jax.models.hnet.family import FAMILY
from atom_jax.models.hnet.forward import apply, hidden, logits
from atom_jax.models.hnet.memory import cache_use, decode_params, full, grow, init_cache, unstack
from atom_jax.models.hnet.waiting import step

__all__ = [
    "FAMILY", "HNetConfig", "apply", "cache_use", "chunking", "decode_params", "full", "grow", "hidden", "init_cache",
    "logits", "read_whole", "roomier", "spec", "step", "unstack",
]  # fmt: skip
