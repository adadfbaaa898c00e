"""Retrofits of published models with Dynamic Memory Sparsification (kvcache/dms), and with merging (kvcache/dmc).

make smollm2 english
python train.py --config=configs/dms.py:smollm2 --workdir=runs/dms

Compile-time figures (`--compile_only --topology=v5p:4x4x4`, libtpu 0.0.42.1) of qwen3_8b_pod, 8 rows of 32,768
tokens: per chip parameters 1.909 GiB, optimiser state 0.002, temporaries 4.361, in all 6.273 of 95 (93% free);
2.20e16 operations per step, 2.85e16 with what is computed again, which take at least 0.97 s; 74.6 GiB sent per chip
and step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.data.config import DataConfig
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.dms import DMS
from atom_jax.models.transformer import TransformerConfig
from atom_jax.sharding import MeshConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import Distill, Fit


def smollm2(entries: int = 512) -> Experiment:
    """The share of evictions demanded rises beyond what 512 entries need, so that it serves stricter thresholds."""
    return Experiment(
        init_from="models/smollm2-135m-instruct",
        memory=DMS(
            form="observed", window=128, scale=1.0, offset=0.0, tau=0.5, bias=True, sinks=4, cr=2048 / entries
        ),
        data=english(2048),
        tokenizer="",
        fit=Fit(target="loss", windows=12, entries=entries),
        distill=Distill(direction="both", cr_start=5.0, cr_end=8.0, cr_steps=70, remat=False),
        optim=adapters_only(learning_rate=3e-3, warmup_steps=5, final_fraction=0.1),
        train=TrainConfig(steps=70, log_every=5, eval_every=0, checkpoint_every=20),
    )


def smollm2_8x() -> Experiment:
    """The same evictors, trained on with the threshold where 256 entries stay, on other rows, together with
    corrections of attention's projections."""
    exp = smollm2(256)
    return dataclasses.replace(
        exp, init_from="runs/dms", fit=dataclasses.replace(exp.fit, windows=0),
        memory=dataclasses.replace(exp.memory, rank=8),
        optim=adapters_only(
            Group(r"layers/attn/dms/._[ab]", 0.3), learning_rate=2e-3, warmup_steps=5, final_fraction=0.1
        ),
        data=dataclasses.replace(exp.data, seed=1),
        distill=Distill(direction="both", cr_start=15.0, cr_end=22.0, cr_steps=70, remat=False),
    )  # fmt: skip


def asks(exp: Experiment, size: int = 6000, facts: int = 8, gap: int = 1000) -> Experiment:
    """The same retrofit, but half of the text (in bytes) has facts planted in it that are asked for later, `facts` in
    a document of `size` bytes: there the loss feels what was evicted. Text is cut into pieces of about two rows, that
    both kinds take turns. The fit, and the threshold that is set in the end, are of the rows that are full of one
    piece of running text."""
    data, options = exp.data, f"size={size}:facts={facts}:gap={gap}"
    asking = tuple(f"facts:{source}:{options}" for source in data.sources)
    weights = data.weights or (1.0,) * len(data.sources)
    data = dataclasses.replace(
        data, sources=(*data.sources, *asking), weights=(*weights, *weights), piece_bytes=8 * data.seq_len
    )
    return dataclasses.replace(exp, data=data)


def smollm2_asks() -> Experiment:
    """The adapter smollm2-135m-dms-4x-v2: 25 minutes on two CPU cores."""
    return asks(smollm2())


def smollm2_asks_8x() -> Experiment:
    """`smollm2_8x` after `smollm2_asks`, from runs/dms-asks: 24 minutes. The adapter smollm2-135m-dms-8x had 70
    further steps, and slopes (its card says how)."""
    return dataclasses.replace(asks(smollm2_8x()), init_from="runs/dms-asks")


def smollm2_far() -> Experiment:
    """What `smollm2_asks_8x` has learned, with other thresholds, as smollm2-135m-dms-4x has them (its card says how
    it was made). Not run whole so far."""
    return far(smollm2_asks_8x(), "runs/dms-asks-8x", 2048)


def smollm2_far_8x() -> Experiment:
    """The same for 8x. Not run whole so far."""
    return far(smollm2_asks_8x(), "runs/dms-asks-8x", 1024)


def far(exp: Experiment, init_from: str, entries: int, seq_len: int = 8192) -> Experiment:
    """A retrofit of which nothing is trained any more: after one step that changes nothing the threshold, and its
    slopes for what lies beyond the rows before, are moved to where this share of rows of any length stays."""
    return dataclasses.replace(
        exp, init_from=init_from, distill=None, data=english(seq_len),
        memory=dataclasses.replace(exp.memory, beyond=exp.data.seq_len, cr=seq_len / entries),
        fit=dataclasses.replace(exp.fit, windows=0, calibration=4, entries=entries),
        optim=OptimConfig(learning_rate=0.0, warmup_steps=0),
        train=TrainConfig(steps=1, log_every=1, eval_every=0),
    )  # fmt: skip


def smollm2_merged(entries: int = 512) -> Experiment:
    """Merging in place of eviction, in our form: means of keys after RoPE, with their mass, which tokens join when
    they leave the window."""
    return merged(smollm2(entries))


def merged(exp: Experiment) -> Experiment:
    """The same retrofit with merging."""
    memory = DMC(
        "observed", window=exp.memory.window, turned=True, mass=True, scale=1.0, offset=0.0, tau=0.5, bias=True,
        sinks=4, cr=exp.memory.cr,
    )  # fmt: skip
    return dataclasses.replace(exp, memory=memory, fit=dataclasses.replace(exp.fit, target="output"))


def tiny_merged() -> Experiment:
    return merged(tiny())


def tiny_asks() -> Experiment:
    exp = tiny()
    exp = dataclasses.replace(exp, data=DataConfig(seq_len=768, batch_size=8))
    return asks(exp, size=700, facts=1, gap=100)


def tiny_far() -> Experiment:
    before = tiny()
    exp = far(before, before.init_from, 160, 640)
    fit = dataclasses.replace(before.fit, entries=160)
    return dataclasses.replace(exp, data=DataConfig(seq_len=640, batch_size=8), fit=fit)


def tiny() -> Experiment:
    exp = smollm2()
    return dataclasses.replace(
        exp, memory=dataclasses.replace(exp.memory, window=16), data=DataConfig(seq_len=256, batch_size=8),
        fit=Fit(target="attention", windows=2, calibration=1, entries=64),
        train=TrainConfig(steps=4, log_every=1, eval_every=4, eval_batches=1),
    )  # fmt: skip


def published(model: TransformerConfig, name: str, seq_len: int, batch_size: int, **options: Any) -> Experiment:
    """The open recipe of NVIDIA's Model-Optimizer: adapters only, KL(student || teacher), CR 1 to 16 in 510 steps."""
    return Experiment(
        model=dataclasses.replace(model, memory=DMS(form="adapter", window=512, cr=8.0), remat=True),
        init_from=name,
        tokenizer="",
        data=DataConfig(sources=("corpora/openr1_math.jsonl",), seq_len=seq_len, batch_size=batch_size),
        distill=Distill(direction="reverse", cr_start=1.0, cr_end=16.0, cr_steps=510),
        optim=adapters_only(learning_rate=3e-5, schedule="constant", warmup_steps=0),
        train=TrainConfig(steps=544, eval_every=0, checkpoint_every=34, keep=16),
        seed=42,
        **options,
    )


def qwen3_1b7() -> Experiment:
    model = qwen3(d_model=2048, n_layers=28, n_heads=16, d_ff=6144, tie_embeddings=True)
    exp = published(model, "Qwen/Qwen3-1.7B", 8192, 16)
    return dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, accumulate=16))


def qwen3_8b() -> Experiment:
    model = qwen3(d_model=4096, n_layers=36, n_heads=32, d_ff=12288, tie_embeddings=False)
    return published(model, "Qwen/Qwen3-8B", 32768, 8, mesh=MeshConfig(fsdp=8))


def qwen3_1b7_asks() -> Experiment:
    """Untrained so far."""
    return asks(qwen3_1b7(), size=16_000, facts=20, gap=4000)


def qwen3_8b_asks() -> Experiment:
    """Untrained so far."""
    return asks(qwen3_8b(), size=64_000, facts=80, gap=16_000)


def qwen3_8b_pod() -> Experiment:
    """The same on 64 chips: two rows for every 16 chips, whose heads and positions are spread four ways each."""
    return dataclasses.replace(qwen3_8b(), mesh=MeshConfig(data=1, fsdp=4, context=4, tensor=4))


def qwen3(**sizes: Any) -> TransformerConfig:
    return TransformerConfig(
        family="qwen3", vocab_size=151936, n_kv_heads=8, head_dim=128, norm_eps=1e-6, rope_theta=1e6,
        max_length=40960, bos_id=151643, eos_ids=(151645, 151643), pad_id=151643, dtype="bfloat16", **sizes,
    )  # fmt: skip


def adapters_only(*groups: Group, **options: Any) -> OptimConfig:
    return OptimConfig(weight_decay=0.0, groups=(*groups, Group(r"(?!layers/attn/dm[cs]/).*")), **options)


def english(seq_len: int) -> DataConfig:
    """What `make english` fetches, prose first."""
    weights = {"brown": 3.0, "handbook": 1.0, "jargon": 1.0, "office": 1.0, "postgres": 2.0}
    sources = tuple(f"corpora/english/{name}" for name in weights)
    return DataConfig(sources=sources, weights=tuple(weights.values()), seq_len=seq_len, batch_size=1)


VARIANTS = {
    "smollm2": smollm2, "smollm2_8x": smollm2_8x, "smollm2_asks": smollm2_asks, "smollm2_asks_8x": smollm2_asks_8x,
    "smollm2_far": smollm2_far, "smollm2_far_8x": smollm2_far_8x, "smollm2_merged": smollm2_merged, "tiny": tiny,
    "tiny_merged": tiny_merged, "tiny_asks": tiny_asks, "tiny_far": tiny_far,
    "qwen3_1b7": qwen3_1b7, "qwen3_1b7_asks": qwen3_1b7_asks, "qwen3_8b": qwen3_8b, "qwen3_8b_asks": qwen3_8b_asks,
    "qwen3_8b_pod": qwen3_8b_pod,
}  # fmt: skip
