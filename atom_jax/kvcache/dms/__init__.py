"""Dynamic Memory Sparsification (Łańcucki et al., 2025): every key is kept or evicted, as learned.

policy    the hooks that a model calls
published names of tensors, and fields of config.json
config    the forms of the decision, and their sizes
decide    decision logits, their relaxation for training, and what they mean for attention
observed  the attention that a key receives while it is in the window
serve     the cache: prompts in parts, one token at a time, several turns
revised   a policy that looks again at what was kept
"""

from atom_jax.kvcache.dms.policy import DMS
from atom_jax.kvcache.dms.revised import Revised

__all__ = ["DMS", "Revised"]
