"""Classifiers of small images, on which token reduction is measured.

    python train.py --config=configs/image.py:cct --workdir=runs/cct
    python eval.py --checkpoint=runs/cct --tasks=reduction --out=runs/reduction.json

`cct` reads scikit-learn's digits (pip install 'atom-jax[vision]'), `cct_numerals` numerals that it draws itself.
"""

from __future__ import annotations

import dataclasses

from atom_jax.data.config import DataConfig
from atom_jax.models.cct import CCTConfig
from atom_jax.training.config import Experiment, OptimConfig, TrainConfig
from atom_jax.training.objectives import Classify


def cct(source: str = "digits") -> Experiment:
    """A compact convolutional transformer: 8 x 8 pixels, a token for each, 0.05 million parameters."""
    model = CCTConfig(size=8, convolutions=2, pool=1, d_model=32, d_ff=64, n_layers=4, n_heads=4)
    return Experiment(
        model=model, tokenizer="pixels", objective=Classify(shift=1),
        data=DataConfig(
            sources=(f"labelled:{source}:size={model.size}",), whole=True, seq_len=model.max_length, batch_size=32
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=40, weight_decay=0.05, ema=0.98),
        train=TrainConfig(steps=600, log_every=20, eval_every=200, eval_batches=6),
    )  # fmt: skip


def cct_numerals() -> Experiment:
    """The same on drawn numerals."""
    return cct("numerals")


def tiny() -> Experiment:
    """Seconds."""
    exp = cct_numerals()
    model = dataclasses.replace(exp.model, convolutions=1, d_model=16, d_ff=24, n_layers=2, n_heads=2)
    return dataclasses.replace(
        exp,
        model=model,
        data=dataclasses.replace(exp.data, batch_size=16),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(steps=24, log_every=1, eval_every=12, eval_batches=1, checkpoint_every=12),
    )


VARIANTS = {"cct": cct, "cct_numerals": cct_numerals, "tiny": tiny}
