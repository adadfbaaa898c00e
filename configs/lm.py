"""Byte-level language models on the novels of Jane Austen that come with the package.

    python train.py --config=configs/lm.py:quick --workdir=runs/quick

Bits per byte of the validation text (`python -m atom_jax summary WORKDIR`), where xz -9e with the training text as
history needs 2.172 and an order-5 Kneser-Ney model 1.889; times on two CPU cores:

quick  1.846 after 500 steps, 4 minutes.
base   1.671 after 1,500 steps, 20 minutes.
tiny   seconds; for tests.
"""

from __future__ import annotations

from atom_jax.data.config import DataConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment, OptimConfig, TrainConfig


def byte_model(d_model: int, n_layers: int, head_dim: int = 64, window: int = 256, **changes) -> TransformerConfig:
    """A Qwen3-style model over bytes whose layers all see `window` bytes back, so that it can write without end.

    The MLP is 8/3 as wide as the model, rounded up to a multiple of 64.
    """
    heads = d_model // head_dim
    return TransformerConfig(
        family="qwen3", vocab_size=264, d_model=d_model, n_layers=n_layers, n_heads=heads, n_kv_heads=heads,
        head_dim=head_dim, d_ff=-(-d_model * 8 // 3 // 64) * 64, layer_types=("sliding",) * n_layers,
        sliding_window=window, max_length=65536, bos_id=256, eos_ids=(257,), pad_id=258, **changes,
    )  # fmt: skip


def quick() -> Experiment:
    return Experiment(
        model=byte_model(d_model=192, n_layers=4, remat=True),
        data=DataConfig(sources=("austen",), seq_len=256, batch_size=16),
        optim=OptimConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.05),
        train=TrainConfig(steps=500, eval_every=100, eval_batches=12, sample_prompt="It was"),
    )


def base() -> Experiment:
    return Experiment(
        model=byte_model(d_model=256, n_layers=4, remat=True),
        data=DataConfig(sources=("austen",), seq_len=256, batch_size=16),
        optim=OptimConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=50, final_fraction=0.02),
        train=TrainConfig(steps=1500, eval_every=250, eval_batches=12, sample_prompt="It was"),
    )


def tiny() -> Experiment:
    return Experiment(
        model=byte_model(d_model=32, n_layers=2, head_dim=16, window=32),
        data=DataConfig(sources=("austen",), seq_len=32, batch_size=8),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=5),
        train=TrainConfig(steps=20, log_every=1, eval_every=10, eval_batches=2, checkpoint_every=5),
    )


VARIANTS = {"quick": quick, "base": base, "tiny": tiny}
