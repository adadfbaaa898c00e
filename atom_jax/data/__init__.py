"""Text sources, and the packed batches made of them, numpy and Grain only; and worlds to act in (envs), in JAX."""
