"""Models that learn to speak another tokenizer (docs/transfer.md).

    make smollm2 english
    python -m atom_jax transplant models/smollm2-135m-instruct --tokenizer=Qwen/Qwen3-0.6B --out=runs/qwen
    python train.py --config=configs/transfer.py:alm --workdir=runs/alm --init_from=runs/qwen

makes SmolLM2-135M-Instruct with Qwen3's tokenizer like itself with its own, by what both think of aligned chunks of
text (ALM, 2503.20083): a recipe cut short for two CPU cores, where the published one has 5,000 steps of 64 rows of
512 tokens of conversations, LoRA of rank 64, and a table behind a projector. Validation reports "alm", what is
minimised, and bits per byte, beside those of the teacher.

    python train.py --config=configs/transfer.py:hypernet --workdir=runs/hypernet
    python -m atom_jax transplant models/smollm2-135m-instruct --tokenizer=Qwen/Qwen3-0.6B \
        --method=hypernet:path=runs/hypernet --out=runs/qwen

trains a network that makes the rows of any tokenizer for SmolLM2-135M-Instruct (ZeTT, 2405.07883) from those of the
pieces that its tokens are cut into. Tokenizers are drawn anew for every batch; here with 4,096 ids, a few hundred
times, where the published one has 32,768 ids and 200,000 steps. Validation reports bits per byte with tokenizers that
are drawn from the held-out text, the judged rows among it, and "fvt_bits" with means of pieces, which is where
training starts: the two compare with each other, not with bits per byte of a tokenizer that is given.

alm       all weights.
alm_lora  the table, and corrections of rank 64 beside every projection (LoRA); the teacher has the layers in common.
alm_8b    Llama 3 8B onto Qwen3's tokenizer, by LoRA, on 64 chips; the text has to be supplied.
          Compile-time figures (`--compile_only --topology=v5p:4x4x4`, libtpu 0.0.42.1), 64 rows of 512 tokens: per
          chip parameters 0.951 GiB, optimiser state 0.964, temporaries 6.683, in all 8.608 of 95 (91% free); 1.58e15
          operations per step, 2.09e15 with what is computed again, at least 0.07 s; 89.7 GiB sent.
hypernet  one layer, for SmolLM2.
tiny, tiny_hypernet  seconds; for tests, which name init_from and objective.source.
"""

from __future__ import annotations

import dataclasses

from atom_jax.data.config import DataConfig
from atom_jax.data.sampled import Sampling
from atom_jax.models.lora import LoRA
from atom_jax.models.transformer import TransformerConfig
from atom_jax.sharding import MeshConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import Alm, TrainHypernet
from atom_jax.transfer.alm import ALM
from atom_jax.transfer.hypernet import Projector

TEACHER = (Group("source/.*"),)
# With LoRA: of the student, its table learns beside the corrections.
SHARED = (*TEACHER, Group(r"norm|layers/(?!lora/).*"))
# Of a hypernetwork, all but its scales learn; the model does not.
MAKER = (Group("hypernet/(in|out)_scale/.*"), Group("(?!hypernet/).*"))
ENGLISH = {"brown": 3.0, "handbook": 1.0, "jargon": 1.0, "office": 1.0, "postgres": 2.0}


def alm() -> Experiment:
    return Experiment(
        tokenizer="", objective=Alm(source="models/smollm2-135m-instruct"),
        data=DataConfig(
            sources=tuple(f"corpora/english/{name}" for name in ENGLISH), weights=tuple(ENGLISH.values()),
            seq_len=288, tokens=288, batch_size=4, piece_bytes=4096,
        ),
        optim=OptimConfig(
            learning_rate=1e-4, warmup_steps=20, final_fraction=0.05, weight_decay=0.01, groups=TEACHER
        ),
        train=TrainConfig(
            steps=300, log_every=5, eval_every=100, eval_first=True, eval_batches=12, checkpoint_every=100,
            sample_prompt="The house stood", sample_tokens=60,
        ),
    )  # fmt: skip


def alm_lora() -> Experiment:
    exp = alm()
    return dataclasses.replace(
        exp, lora=LoRA(rank=64, alpha=64.0), optim=dataclasses.replace(exp.optim, learning_rate=3e-4, groups=SHARED)
    )


def alm_8b() -> Experiment:
    llama = TransformerConfig(
        family="llama", vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
        d_ff=14336, norm_eps=1e-5, rope_theta=500000.0, tie_embeddings=False, max_length=8192, dtype="bfloat16",
        remat=True,
    )  # fmt: skip
    exp = alm_lora()
    return dataclasses.replace(
        exp, lora=None, model=dataclasses.replace(llama, vocab_size=151936, lora=LoRA(rank=64, alpha=64.0)),
        init_from="runs/llama3-qwen", objective=Alm(source="meta-llama/Meta-Llama-3-8B", teacher=llama),
        data=DataConfig(sources=("corpora/tulu.jsonl",), seq_len=512, tokens=512, batch_size=64),
        optim=OptimConfig(
            learning_rate=1e-5, schedule="wsd", warmup_steps=2000, decay_fraction=0.6, final_fraction=0.0,
            weight_decay=0.01, groups=SHARED,
        ),
        train=TrainConfig(steps=5000, eval_every=500), mesh=MeshConfig(data=1, fsdp=64),
    )  # fmt: skip


def hypernet() -> Experiment:
    exp = alm()
    return dataclasses.replace(
        exp, init_from="models/smollm2-135m-instruct",
        objective=TrainHypernet(net=Projector(1, 576, length=7), sampling=Sampling(vocabulary=4096, texts=128)),
        data=dataclasses.replace(exp.data, seq_len=128, tokens=0, batch_size=8, piece_bytes=512),
        optim=OptimConfig(
            learning_rate=1e-3, warmup_steps=20, final_fraction=0.1, weight_decay=0.01, clip_norm=0.1, groups=MAKER
        ),
        train=dataclasses.replace(exp.train, sample_prompt=""),
    )  # fmt: skip


def tiny() -> Experiment:
    return Experiment(
        tokenizer="", objective=Alm(how=ALM(tau=10.0)),
        data=DataConfig(seq_len=96, tokens=48, batch_size=8, piece_bytes=256),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=1, groups=TEACHER),
        train=TrainConfig(
            steps=6, log_every=1, eval_every=6, eval_first=True, eval_batches=2, checkpoint_every=3,
        ),
    )  # fmt: skip


def tiny_hypernet() -> Experiment:
    exp = tiny()
    return dataclasses.replace(
        exp, objective=TrainHypernet(
            net=Projector(1, 32, length=4, alpha=20.0), sampling=Sampling(vocabulary=384, texts=16), lexical=0.0
        ),
        data=DataConfig(seq_len=48, batch_size=8, piece_bytes=256),
        optim=OptimConfig(learning_rate=3e-2, warmup_steps=1, weight_decay=0.0, groups=MAKER),
    )  # fmt: skip


VARIANTS = {
    "alm": alm, "alm_lora": alm_lora, "alm_8b": alm_8b, "hypernet": hypernet, "tiny": tiny,
    "tiny_hypernet": tiny_hypernet,
}  # fmt: skip
