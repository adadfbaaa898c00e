"""Bolmo from scratch: mLSTM over bytes, a transformer over patches, on the novels of Jane Austen.

    python train.py --config=configs/bolmo.py:small --workdir=runs/bolmo

Where patches end is learnt from the pieces of a unigram model of the training text, as Bolmo learns it from its
source's subwords; there is no table of suffix subwords. The objective is that of Bolmo's second stage (`atom_jax.
transfer.byteify.stage2`): the next byte together with whether it ends a patch, so that "loss" counts both.

small  the width of the models in configs/units.py.
tiny   seconds; for tests.
"""

from __future__ import annotations

from atom_jax.chunking.rules.lookahead import Lookahead
from atom_jax.data.config import DataConfig
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment, OptimConfig, TrainConfig


def byte_model(d_model: int, n_layers: int, decoder_layers: int, heads: int, **changes) -> BolmoConfig:
    """A Bolmo whose layers over patches are OLMo 2's; MLPs are 8/3 as wide as the model."""
    d_ff = -(-d_model * 8 // 3 // 16) * 16
    main = TransformerConfig(
        family="olmo2", d_model=d_model, n_layers=n_layers, n_heads=heads, n_kv_heads=heads,
        head_dim=d_model // heads, d_ff=d_ff, max_length=65536,
    )  # fmt: skip
    return BolmoConfig(
        main=main, subwords=0, decoder_layers=decoder_layers, local_heads=heads, local_d_ff=d_ff,
        rule=Lookahead(weight=4.0), **changes,
    )  # fmt: skip


def small() -> Experiment:
    return Experiment(
        model=byte_model(d_model=192, n_layers=3, decoder_layers=1, heads=4, remat=True, capacity=0.5),
        tokenizer="bolmo",
        data=DataConfig(sources=("austen",), seq_len=256, batch_size=16, marks="unigram:2048"),
        optim=OptimConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.05),
        train=TrainConfig(steps=500, eval_every=100, eval_batches=12, sample_prompt="It was"),
    )


def tiny() -> Experiment:
    return Experiment(
        model=byte_model(d_model=32, n_layers=1, decoder_layers=1, heads=2),
        tokenizer="bolmo",
        data=DataConfig(sources=("austen",), seq_len=48, batch_size=8, marks="unigram:300"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(steps=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=4, sample_prompt="It"),
    )


VARIANTS = {"small": small, "tiny": tiny}
