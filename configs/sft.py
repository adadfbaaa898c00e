"""Fine-tuning of published models on conversations, of which the answers are learned.

    python -m atom_jax.data.fetch chats
    python train.py --config=configs/sft.py:smollm2_lora --workdir=runs/sft

tunes SmolLM2-135M-Instruct on small talk between people (data/fetch/chats.py). Any model and any conversations:

    python train.py --config=configs/sft.py:lora --workdir=runs/mine --init_from=PATH --set data.sources=mine.jsonl

Validation before the first step and after the last one is on conversations that are kept from training.

smollm2         all weights.
smollm2_lora    corrections of rank 8 beside every projection (LoRA); the weights stay.
smollm2_memory  the same with learned memory on (adapter): what evictors drop, the model learns to do without.
full, lora      of a model and sources that are named on the command line.
tiny            seconds; for tests, which name them too.

`python -m atom_jax merge WORKDIR DIR` writes a model for transformers, `python -m atom_jax adapter WORKDIR DIR` LoRA
alone for PEFT; `chat --checkpoint=WORKDIR` talks with either.
"""

from __future__ import annotations

import dataclasses

from atom_jax.data.config import DataConfig
from atom_jax.models.lora import LoRA
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import NextToken


def full(**fields) -> Experiment:
    """Learned memory that the model has decides as it will when the model is used, and stays as it is."""
    return Experiment(
        tokenizer="",
        data=DataConfig(sources=("conversations.jsonl",), chat=True, whole=True, seq_len=1024, batch_size=2),
        optim=OptimConfig(learning_rate=5e-5, warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(
            steps=150, log_every=5, eval_every=75, eval_first=True, eval_batches=8, checkpoint_every=75
        ),
        objective=NextToken(hard=True),
        **fields,
    )


def lora(**fields) -> Experiment:
    exp = full(lora=LoRA(rank=8, alpha=16.0), **fields)
    optim = dataclasses.replace(exp.optim, learning_rate=1e-3, groups=(Group(r"(?!layers/lora/).*"),))
    return dataclasses.replace(exp, optim=optim)


def small_talk(exp: Experiment) -> Experiment:
    return dataclasses.replace(
        exp, init_from="models/smollm2-135m-instruct", data=dataclasses.replace(exp.data, sources=("corpora/chats",))
    )


def smollm2() -> Experiment:
    return small_talk(full())


def smollm2_lora() -> Experiment:
    return small_talk(lora())


def smollm2_memory() -> Experiment:
    return dataclasses.replace(smollm2_lora(), adapter="smollm2-135m-dms-4x")


def tiny() -> Experiment:
    exp = lora()
    return dataclasses.replace(
        exp, data=dataclasses.replace(exp.data, seq_len=96, batch_size=8),
        train=TrainConfig(
            steps=4, log_every=1, eval_every=4, eval_first=True, eval_batches=1, checkpoint_every=2
        ),
    )  # fmt: skip


VARIANTS = {
    "smollm2": smollm2, "smollm2_lora": smollm2_lora, "smollm2_memory": smollm2_memory, "full": full, "lora": lora,
    "tiny": tiny,
}  # fmt: skip
