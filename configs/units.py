"""Models that choose their own units, one variant per boundary rule, at one size and one training compute.

    python train.py --config=configs/units.py:hnet --workdir=runs/hnet
    python -m benchmarks.units            # trains the variants named there and prints the table of docs/units.md

Every variant reads the same bytes in the same order and spends about the same floating-point operations per byte
(`atom_jax.models.flops`), the two baselines included: `bytes`, a byte-level transformer, and `bpe`, a transformer
over a BPE vocabulary made from the training text.
"""

from __future__ import annotations

WORDS = "at words"
HAT_END = 259
