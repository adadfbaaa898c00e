"""Models that choose their own units, a variant for each way to find them, at one size.

    python train.py --config=configs/units.py:hnet --workdir=runs/hnet
    python -m benchmarks.units            # trains some of them side by side and prints a table

All variants but `quick` and `base` read the same bytes in the same order and spend about the same floating-point
operations per byte (`atom_jax.models.flops`; within 5 percent), and so do the baselines without units: `bytes`, a
transformer over bytes, and `bpe`, one over a BPE vocabulary made from the training text. README has the results.

quick     what `make quickstart` trains, in 5 minutes on two CPU cores.
base      a longer run.
hnet      H-Net: cosine router, first vector, smoothing. hnet2: with two stages. hnet_mamba: Mamba-2 outside.
gumbel    dynamic token pooling, trained end to end; unigram, entropy: its supervised kinds; magnet: one per script.
blt       units end where a small byte model is unsure, pooled by maxima, read through cross-attention.
words     units end at white space; spacebyte: at SpaceByte's places; hat: at emitted word ends, attention pooling.
megabyte  units of four bytes, side by side, spread by a matrix for each place.
hnet_1stage_xl, hnet_2stage_xl   the released sizes, for an accelerator.
tiny      seconds; for tests.
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
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig

HAT_WORD_END = 259


def units(
    chunks: Chunking | tuple[Chunking, ...],
    layout: tuple[str, ...] = ("T1", "T3", "T1"),
    d_model: tuple[int, ...] = (128, 256),
    window: tuple[int, ...] = (63, -1),
    ngrams: tuple[int, ...] = (3, 4, 5, 6),
    **changes: Any,
) -> HNetConfig:
    """A small model over bytes with these units; MLPs are 8/3 as wide as their stage."""
    return HNetConfig(
        vocab_size=264, layout=layout, d_model=d_model, d_intermediate=tuple(d * 8 // 3 for d in d_model),
        n_heads=tuple(d // 64 for d in d_model), rotary_dim=(32,) * len(d_model), window=window,
        chunking=chunks if isinstance(chunks, tuple) else (chunks,), tie_embeddings=True, init_std=0.07,
        ngrams=ngrams, ngram_rows=8192, bos_id=256, eos_ids=(257,), pad_id=258, remat=True, **changes,
    )  # fmt: skip


def router(target: float, capacity: float, weight: float = 0.3) -> Chunking:
    """H-Net's units. The ratio loss weighs ten times the published 0.03: a short run has to settle in few steps."""
    return dataclasses.replace(chunking(capacity=capacity, pack=True), rule=Cosine(target=target, weight=weight))


def pooled(rule: Any, capacity: float = 0.25, **changes: Any) -> Chunking:
    """Dynamic token pooling's way: means of finished units, added to the bytes that follow."""
    options = {"pool": "mean", "residual": "identity"} | changes
    return Chunking(rule=rule, capacity=capacity, pack=True, **options)


def experiment(model: Any, tokenizer: str = "bytes", steps: int = 400, marks: str = "", **optim: Any) -> Experiment:
    rate = {"optimizer": "muon", "learning_rate": 1e-2, "warmup_steps": 30, "final_fraction": 0.05} | optim
    return Experiment(
        model=model,
        tokenizer=tokenizer,
        data=DataConfig(sources=("austen",), seq_len=256, batch_size=16, marks=marks),
        optim=OptimConfig(**rate),
        train=TrainConfig(steps=steps, eval_every=100, eval_batches=12, sample_prompt="It was"),
    )
