"""Bolmo: mLSTM over bytes, a transformer over patches.

    python train.py --config=configs/bolmo.py:small --workdir=runs/bolmo

trains one from scratch on the novels of Jane Austen. Where patches end is learnt from the pieces of a unigram model
of the training text, as Bolmo learns it from its source's subwords; there is no table of suffix subwords. The
objective is that of Bolmo's second stage (`atom_jax.transfer.byteify.stage2`): the next byte together with whether it
ends a patch, so that "loss" counts both.

small  the width of the models in configs/units.py.
tiny   seconds; for tests.

    make smollm2 english
    python train.py --config=configs/bolmo.py:smollm2 --workdir=runs/bolmo

makes one of a subword model (Minixhofer et al., 2025, section 4; docs/bolmo.md): in stage 1 (WORKDIR/first) what is
around the source's layers learns to imitate it, in stage 2 everything is trained on.

smollm2          of SmolLM2-135M-Instruct (dequantized), on two CPU cores: a recipe cut short, and not the published
                 one, with two layers in the decoder instead of four, a two-hundred-thousandth of the published
                 text, higher learning rates, and Muon in stage 1.
bolmo_1b, _7b    the published recipes, of OLMo 2 1B and OLMo 3 7B, for 64 chips. Rows are whole documents or parts of
                 them, where the published runs pack several into one; the text has to be supplied.
..._stage1       their first stages alone.
tiny_byteify     seconds; for tests, which say what byteify.source is.

Stage 1 of the published recipes has the b2 of the scripts, 0.999 (the paper: 0.95).

Compile-time figures (`--compile_only --topology=v5p:4x4x4`, libtpu 0.0.42.1) of bolmo_7b's second stage, 64 rows of
24,576 bytes: per chip parameters 0.447 GiB, optimiser state 0.893, temporaries 9.380, in all 10.721 of 95 (89% free);
1.80e16 operations per step, 2.40e16 with what is computed again, which take at least 0.82 s; 100.5 GiB sent per chip
and step. Its first stage, 32 rows: parameters with the source's tables 0.498, optimiser state 0.143, temporaries
7.738, in all 8.379 (91% free); 5.89e15 and 7.28e15 operations, at least 0.25 s; 80.8 GiB sent.
"""

from __future__ import annotations

import dataclasses

from atom_jax.chunking.rules.lookahead import Lookahead
from atom_jax.data.config import DataConfig
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.sharding import MeshConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import Byteify
from atom_jax.transfer.byteify import Stage1


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


IMITATION = (Group("(main|source)/.*"),)
# Layers over patches at half the learning rate of everything else.
HALF = (Group("main/.*", 0.5),)


def published(
    model: BolmoConfig, source: str, first_rate: float, second_rate: float, first_mesh: MeshConfig, mesh: MeshConfig
) -> Experiment:
    """Rows of 4,096 subwords in 24,576 bytes; 32 of them for 75,000 steps, then 64 for 150,000."""
    model = dataclasses.replace(model, capacity=4096 / 24576, chunk=128, dtype="bfloat16", remat=True)
    data = DataConfig(sources=("corpora/bolmo_mix.jsonl",), seq_len=24576, tokens=4096, batch_size=32)
    optim = OptimConfig(
        learning_rate=first_rate, schedule="wsd", warmup_steps=7500, decay_fraction=0.9, final_fraction=0.0,
        b2=0.999, decay_pattern="(?!(embed|subwords)$).*", clip_norm=0.5, groups=IMITATION,
    )  # fmt: skip
    train = TrainConfig(steps=75000, eval_every=5000)
    first = Experiment(
        model=model, tokenizer="bolmo", byteify=Byteify(source=source), data=data, optim=optim, train=train,
        mesh=first_mesh,
    )  # fmt: skip
    return dataclasses.replace(
        first, first=first, byteify=Byteify(source=source, stage=2),
        data=dataclasses.replace(data, batch_size=64, seed=1),
        optim=dataclasses.replace(optim, learning_rate=second_rate, warmup_steps=15000, b2=0.95, groups=HALF),
        train=dataclasses.replace(train, steps=150000), mesh=mesh,
    )  # fmt: skip


def bolmo_1b() -> Experiment:
    main = TransformerConfig(
        family="olmo2", vocab_size=100352, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128,
        d_ff=8192, norm_eps=1e-6, rope_theta=500000.0, tie_embeddings=False, max_length=4096,
    )  # fmt: skip
    meshes = MeshConfig(data=1, fsdp=32, tensor=2), MeshConfig(data=1, fsdp=64)
    return published(BolmoConfig(main=main), "allenai/OLMo-2-0425-1B", 7e-4, 5.2e-5, *meshes)


def bolmo_7b() -> Experiment:
    main = TransformerConfig(
        family="olmo3", vocab_size=100278, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
        d_ff=11008, norm_eps=1e-6, rope_theta=500000.0, tie_embeddings=False, max_length=65536,
        layer_types=("sliding", "sliding", "sliding", "full") * 8,
    )  # fmt: skip
    meshes = MeshConfig(data=1, fsdp=32, tensor=2), MeshConfig(data=1, fsdp=64)
    return published(BolmoConfig(main=main, local_d_ff=5504), "allenai/Olmo-3-1025-7B", 5e-4, 3.66e-5, *meshes)


def smollm2() -> Experiment:
    source = "models/smollm2-135m-instruct"
    main = TransformerConfig(
        family="llama", vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536,
        norm_eps=1e-5, rope_theta=1e5, bos_id=1, eos_ids=(2,), pad_id=2,
    )  # fmt: skip
    model = BolmoConfig(
        main=main, subwords=49152, decoder_layers=2, local_heads=4, local_d_ff=768, capacity=0.25, chunk=64,
        max_length=8192, subword_tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct",
    )  # fmt: skip
    weights = {"brown": 3.0, "handbook": 1.0, "jargon": 1.0, "office": 1.0, "postgres": 2.0}
    data = DataConfig(
        sources=tuple(f"corpora/english/{name}" for name in weights), weights=tuple(weights.values()),
        seq_len=2304, tokens=512, batch_size=2, piece_bytes=4096,
    )  # fmt: skip
    optim = OptimConfig(
        optimizer="muon", learning_rate=5e-3, warmup_steps=20, final_fraction=0.05, groups=IMITATION, clip_norm=0.5
    )
    train = TrainConfig(
        steps=180, log_every=5, eval_every=80, eval_batches=12, checkpoint_every=80, sample_prompt="The house stood",
        sample_tokens=100,
    )  # fmt: skip
    first = Experiment(
        model=model, tokenizer="bolmo", byteify=Byteify(source=source), data=data, optim=optim, train=train
    )
    return dataclasses.replace(
        first, first=first, byteify=Byteify(source=source, stage=2), data=dataclasses.replace(data, seed=1),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=6, final_fraction=0.05, groups=HALF, clip_norm=0.5),
        train=dataclasses.replace(train, steps=45, eval_every=45, checkpoint_every=30),
    )  # fmt: skip


def tiny_byteify() -> Experiment:
    main = TransformerConfig(vocab_size=400, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48)
    model = BolmoConfig(main=main, subwords=400, decoder_layers=1, local_heads=2, local_d_ff=48, capacity=1.0)
    data = DataConfig(seq_len=96, tokens=48, batch_size=8, piece_bytes=256)
    train = TrainConfig(
        steps=6, log_every=1, eval_every=3, eval_batches=1, checkpoint_every=3, sample_prompt="It", sample_tokens=4
    )
    first = Experiment(
        model=model, tokenizer="bolmo", byteify=Byteify(imitate=Stage1(depth=1)), data=data, train=train,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, groups=IMITATION),
    )  # fmt: skip
    return dataclasses.replace(
        first, first=first, byteify=Byteify(stage=2), optim=OptimConfig(learning_rate=3e-3, groups=HALF)
    )


VARIANTS = {
    "small": small, "tiny": tiny, "smollm2": smollm2, "bolmo_1b": bolmo_1b, "bolmo_7b": bolmo_7b,
    "bolmo_1b_stage1": lambda: bolmo_1b().first, "bolmo_7b_stage1": lambda: bolmo_7b().first,
    "tiny_byteify": tiny_byteify,
}  # fmt: skip
