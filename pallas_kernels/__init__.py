"""Operations with a Pallas kernel for TPU and a reference in jnp for everything else.

Every folder holds one operation: api.py (validates, pads, chooses), ref.py (what it means, and how it runs on CPU and
GPU), kernel.py (Pallas) and specs.py (named shapes that `make aot` compiles for real chips). For NVIDIA GPUs there is
more of evict_attention.
"""
