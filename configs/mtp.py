"""Multi-token heads for a model that stays as it is (models/mtp.py), to draft what it will say.

    make smollm2 english
    python train.py --config=configs/mtp.py:smollm2 --workdir=runs/mtp
    python -m atom_jax adapter runs/mtp heads
    python -m atom_jax generate --checkpoint=models/smollm2-135m-instruct --draft=mtp:heads=heads --prompt=...

Untrained so far: how many tokens of a draft are accepted after it is not known. Validation reports, beside "kl", how
many would be along the text ("accepted", of four), before the first step too. "loss" is the first head's, two tokens
ahead, with the text.

smollm2  four heads, a million parameters each.
tiny     seconds; for tests, which name init_from.
"""

from __future__ import annotations

from atom_jax.data.config import DataConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import MultiToken

HEADS = (Group("(?!mtp/).*"),)
ENGLISH = {"brown": 3.0, "handbook": 1.0, "jargon": 1.0, "office": 1.0, "postgres": 2.0}


def smollm2() -> Experiment:
    return Experiment(
        init_from="models/smollm2-135m-instruct", tokenizer="", objective=MultiToken(heads=4),
        data=DataConfig(
            sources=tuple(f"corpora/english/{name}" for name in ENGLISH), weights=tuple(ENGLISH.values()),
            seq_len=512, batch_size=4,
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, weight_decay=0.0, groups=HEADS),
        train=TrainConfig(steps=400, log_every=5, eval_every=100, eval_first=True, checkpoint_every=100),
    )  # fmt: skip


def tiny() -> Experiment:
    return Experiment(
        tokenizer="", objective=MultiToken(heads=3),
        data=DataConfig(seq_len=64, batch_size=16),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0, groups=HEADS),
        train=TrainConfig(steps=30, log_every=10, eval_every=30, eval_first=True, eval_batches=2),
    )  # fmt: skip


VARIANTS = {"smollm2": smollm2, "tiny": tiny}
