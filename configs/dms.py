"""Retrofits of published models with Dynamic Memory Sparsification (kvcache/dms).

make smollm2 english
python train.py --config=configs/dms.py:smollm2 --workdir=runs/dms
"""

from __future__ import annotations

from atom_jax.data.config import DataConfig
from atom_jax.kvcache.dms import DMS
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.distill import DistillConfig
from atom_jax.transfer.dms_fit import FitConfig

ENGLISH = ("brown", "handbook", "jargon", "office", "postgres")
ADAPTERS_ONLY = (Group(r"(?!layers/attn/dms/).*"),)


def smollm2(entries: int = 512, share: float = 0.8) -> Experiment:
    return Experiment(
        init_from="models/smollm2-135m-instruct",
        memory=DMS(form="observed", window=128, scale=1.0, offset=0.0, tau=0.5, bias=True, sinks=4, cr=2048 / entries),
        data=DataConfig(
            sources=tuple(f"corpora/english/{name}" for name in ENGLISH), weights=(3.0, 1.0, 1.0, 1.0, 2.0),
            seq_len=2048, batch_size=1,
        ),
        tokenizer="",
        fit=FitConfig(target="attention", entries=entries),
        distill=DistillConfig(direction="both", cr_start=1 / (1 - share), cr_end=1 / (1 - share), cr_steps=1),
        optim=OptimConfig(
            learning_rate=3e-3, warmup_steps=5, final_fraction=0.1, weight_decay=0.0, groups=ADAPTERS_ONLY
        ),
        train=TrainConfig(steps=150, log_every=5, eval_every=0, checkpoint_every=25),
    )  # fmt: skip


VARIANTS = {"smollm2": smollm2}
