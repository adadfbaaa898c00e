"""Sizes of blocks and tiles."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.dispatch import round_up


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A grid step holds `q_block` queries of every head of a group and `k_block` keys in VMEM, and works on tiles of
    `q_tile` queries of one head and `k_tile` keys. A block is a whole number of tiles; on a TPU tiles of keys are
    multiples of 128, blocks of queries too unless they hold all of them."""

    q_block: int
    k_block: int
    q_tile: int
    k_tile: int

    def __post_init__(self):
        if self.q_block % self.q_tile or self.k_block % self.k_tile or self.q_tile % 8 or self.k_tile % 64:
            raise ValueError(f"blocks: {self} are not whole tiles of multiples of 8 queries and 64 keys")


# Queries and keys of a tile, by bytes per number. Of bfloat16 tiles of 256 and 512 these need the fewest instructions
# per score, forward and backward, from the compilers for v5e and v5p, with a third of a spill in each.
TILES = {2: (256, 512), 4: (128, 256)}
# Queries of a whole group, and keys, of a block: large enough that fetching keys takes less time than using them.
ROWS, KEYS = 2048, 2048
# One tile per block: what the Triton kernel's programs hold. At heads of 128 in bfloat16 they need no more than the
# 99 KiB of shared memory of the smallest GPUs that run it.
TRITON = Blocks(64, 64, 64, 64)


def blocks(t: int, s: int, g: int, dtype: jnp.dtype) -> Blocks:
    """Blocks for t queries of g heads that share s keys."""
    q_tile, k_tile = TILES[jnp.dtype(dtype).itemsize]
    q_tile, k_tile = min(q_tile, round_up(t, 128)), min(k_tile, round_up(s, 128))
    q_block = q_tile * max(1, min(ROWS // (g * q_tile), -(-t // q_tile)))
    k_block = k_tile * max(1, min(KEYS // k_tile, -(-s // k_tile)))
    return Blocks(q_block, k_block, q_tile, k_tile)
