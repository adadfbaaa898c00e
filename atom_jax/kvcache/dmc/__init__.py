"""Dynamic Memory Compression (Nawrot et al., 2024): tokens open an entry or join the last, as learned.

policy    the hooks that a model calls
published names of tensors, and fields of config.json
config    the forms of the decision, and their sizes
decide    decisions and weights of tokens, and what they mean for attention
pooling   the means that entries are
newest    tokens that share no entry yet, where that waits for a window
serve     the cache: prompts in parts, one token at a time, several turns
"""

from atom_jax.kvcache.dmc.policy import DMC

__all__ = ["DMC"]
