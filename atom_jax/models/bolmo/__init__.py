"""Bolmo: a subword transformer that reads and writes bytes (Minixhofer et al., 2025, "Bolmo: Byteifying the Next
Generation of Language Models").

    bytes and suffix subwords -> encoder (mLSTM) -> where patches end -> last byte of each patch -> main transformer
    -> every byte reads its latest patch, and adds its own encoder state -> decoder (mLSTM) -> 520 logits

Ids 260 to 519 are ids 0 to 259 where they end a patch: the decoder writes the next byte and says whether it ends one.
"""

from atom_jax.models.bolmo.config import BolmoConfig, read_whole, roomier, spec
from atom_jax.models.bolmo.family import FAMILY
from atom_jax.models.bolmo.forward import apply, hidden, logits
from atom_jax.models.bolmo.ids import codec
from atom_jax.models.bolmo.memory import cache_use, decode_params, full, grow, init_cache, unstack
from atom_jax.models.bolmo.waiting import step

__all__ = [
    "FAMILY", "BolmoConfig", "apply", "cache_use", "codec", "decode_params", "full", "grow", "hidden", "init_cache",
    "logits", "read_whole", "roomier", "spec", "step", "unstack",
]  # fmt: skip
