"""Models that choose their own units, one variant per boundary rule, at one size and one training compute.

    python train.py --config=configs/units.py:hnet --workdir=runs/hnet
    python -m benchmarks.units            # trains the variants named there and prints the table of docs/units.md

Every variant reads the same bytes in the same order and spends about the same floating-point operations per byte
(`atom_jax.models.flops`), the two baselines included: `bytes`, a byte-level transformer, and `bpe`, a transformer
over a BPE vocabulary made from the training text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.checkpoint.hnet_hf import chunking
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.entropy import Entropy
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.data.config import DataConfig
from atom_jax.models.hnet import HNetConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.ssd import Mamba2Config
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig

WORDS = "at words"
HAT_END = 259
