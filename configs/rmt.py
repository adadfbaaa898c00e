"""Recurrent memory transformers (Bulatov et al., 2022) over the bytes of the novels of Jane Austen.

    python train.py --config=configs/rmt.py:small --workdir=runs/rmt

A row has eight segments, through all of which gradients go back.

small  the width of `configs/lm.py:quick`, 64 bytes per segment and 8 memory tokens. Nothing was measured of it.
tiny   seconds; for tests.

A transformer that is trained already becomes one with `init_from`, where `model.main` is its configuration: what is
read before the first segment has initial values then.
"""

from __future__ import annotations

from atom_jax.data.config import DataConfig
from atom_jax.models.rmt import RMTConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment, OptimConfig, TrainConfig


def byte_model(d_model: int, n_layers: int, head_dim: int, segment: int, memory_tokens: int, **changes) -> RMTConfig:
    """A Qwen3-style model over bytes; the MLP is 8/3 as wide as the model, rounded up to a multiple of 64."""
    heads = d_model // head_dim
    main = TransformerConfig(
        family="qwen3", vocab_size=264, d_model=d_model, n_layers=n_layers, n_heads=heads, n_kv_heads=heads,
        head_dim=head_dim, d_ff=-(-d_model * 8 // 3 // 64) * 64, bos_id=256, eos_ids=(257,), pad_id=258,
    )  # fmt: skip
    return RMTConfig(main=main, segment=segment, memory_tokens=memory_tokens, **changes)


def small() -> Experiment:
    return Experiment(
        model=byte_model(d_model=192, n_layers=4, head_dim=64, segment=64, memory_tokens=8, remat=True),
        data=DataConfig(sources=("austen",), seq_len=512, batch_size=8),
        optim=OptimConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.05),
        train=TrainConfig(steps=500, eval_every=100, eval_batches=12, sample_prompt="It was"),
    )


def tiny() -> Experiment:
    return Experiment(
        model=byte_model(d_model=32, n_layers=2, head_dim=16, segment=8, memory_tokens=2, documents=2),
        data=DataConfig(sources=("austen",), seq_len=32, batch_size=8),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=5),
        train=TrainConfig(steps=12, log_every=1, eval_every=6, eval_batches=2, checkpoint_every=6),
    )


VARIANTS = {"small": small, "tiny": tiny}
