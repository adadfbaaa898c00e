"""Bolmo: a subword transformer that reads and writes bytes (Minixhofer et al., 2025, "Bolmo: Byteifying the Next
Generation of Language Models").

    bytes and suffix subwords -> encoder (mLSTM) -> where patches end -> last byte of each patch -> main transformer
    -> every byte reads its latest patch, and adds its own encoder state -> decoder (mLSTM) -> 520 logits

Ids 260 to 519 are ids 0 to 259 where they end a patch: the decoder writes the next byte and says whether it ends one.
"""

from atom_jax.models.bolmo.config import BolmoConfig, roomier, spec
from atom_jax.models.bolmo.family import FAMILY
from atom_jax.models.bolmo.forward import apply, hidden, logits
from atom_jax.models.bolmo.ids import codec
from atom_jax.models.bolmo.memory import decode_params, init_cache
from atom_jax.models.bolmo.waiting import step

__all__ = [
    "FAMILY", "BolmoConfig", "apply", "codec", "decode_params", "hidden", "init_cache", "logits", "roomier", "spec",
    "step",
]  # fmt: skip
