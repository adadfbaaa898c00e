"""Models that choose their own units, a variant for each way to find them, at one size.

    python train.py --config=configs/units.py:hnet --workdir=runs/hnet
    python -m benchmarks.units            # trains some of them side by side and prints a table

The small variants read the same amount of the same text, and none with units spends more floating-point operations
per byte (`models.family.Family.flops`) than the baselines without: `bytes`, a transformer over bytes, and `bpe`, one
over a BPE vocabulary made from the training text. README has the results; numbers here are bits per byte of the
validation text.

quick     what `make quickstart` trains: `entropy_ngrams` for 550 steps. 1.821.
base      larger and longer.
hnet      H-Net: cosine router, first vector, smoothing. hnet2: with two stages. hnet_mamba: Mamba-2 outside.
gumbel    dynamic token pooling, trained end to end; unigram, entropy: its supervised kinds.
magnet    the same with a predictor per script, for texts in seven languages; shared, bpe_parallel: what it is
          compared with.
hnet_ngrams, entropy_ngrams   with hashed embeddings of n-grams as BLT has them; bytes_ngrams: those without units.
blt       units end where a small byte model is unsure, pooled by maxima, read through cross-attention.
words     units end at white space; spacebyte: at SpaceByte's places; hat: at emitted word ends, attention pooling.
megabyte  units of four bytes, side by side, spread by a matrix for each place.

blt, hat and megabyte share these parts with the papers that they are named after, and differ otherwise: byte layers
see a sliding window that crosses units (MegaByte's and HAT's see their own unit alone; MegaByte has no layers before
its units), and the decoder gets each byte's encoder state besides what it reads of the units. BLT's small byte model
is trained before the other one, here next to it.

hnet_1stage_xl, hnet_2stage_xl   the released sizes, for an accelerator. Compile-time figures of hnet_1stage_xl on 64
          chips of a v5p:4x4x4 with mesh.fsdp=64 (`--compile_only`, libtpu 0.0.42.1), 256 rows of 8,192 bytes: per
          chip 0.225 GiB of state and batch, temporaries 8.429, in all 8.654 of 95 (91% free); 15.2 GiB sent per
          step; 4.23e15 operations, 5.64e15 with what is computed again, which take at least 0.19 s.
tiny      seconds; for tests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.entropy import Entropy
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.data.config import DataConfig
from atom_jax.models.hnet import HNetConfig, chunking
from atom_jax.models.hnet.config import lr_factors
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.ssd import Mamba2Config
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig

HAT_WORD_END = 259
# What the released H-Net code decays (optim.decay_pattern): all but biases of layers and the norm inside Mamba-2.
HNET_OFFICIAL_DECAY = r"(?!.*(conv_b|residual/b|mixer/norm)$).*"


def units(
    chunks: Chunking | tuple[Chunking, ...],
    layout: tuple[str, ...] = ("T1", "T2", "T2"),
    d_model: tuple[int, ...] = (192, 256),
    window: tuple[int, ...] = (63, -1),
    **changes: Any,
) -> HNetConfig:
    """A small model over bytes with these units; MLPs are 8/3 as wide as their stage."""
    return HNetConfig(
        vocab_size=264, layout=layout, d_model=d_model, d_intermediate=tuple(d * 8 // 3 for d in d_model),
        n_heads=tuple(max(d // 64, 1) for d in d_model), rotary_dim=(32,) * len(d_model), window=window, qk_norm=True,
        chunking=chunks if isinstance(chunks, tuple) else (chunks,), tie_embeddings=True, init_std=0.07,
        bos_id=256, eos_ids=(257,), pad_id=258, remat=True, **changes,
    )  # fmt: skip


def router(target: float, capacity: float, weight: float = 0.3) -> Chunking:
    """H-Net's units. The ratio loss weighs ten times the published 0.03: a short run has to settle in few steps."""
    return dataclasses.replace(chunking(capacity=capacity, pack=True), rule=Cosine(target=target, weight=weight))


def pooled(rule: Any, capacity: float = 0.25, **changes: Any) -> Chunking:
    """Dynamic token pooling's way: means of finished units, added to the bytes that follow."""
    options = {"pool": "mean", "residual": "identity"} | changes
    return Chunking(rule=rule, capacity=capacity, pack=True, **options)


def experiment(model: Any, tokenizer: str = "bytes", steps: int = 450, marks: str = "", **optim: Any) -> Experiment:
    rate = {"optimizer": "muon", "learning_rate": 1e-2, "warmup_steps": 30, "final_fraction": 0.05} | optim
    return Experiment(
        model=model,
        tokenizer=tokenizer,
        data=DataConfig(sources=("austen",), seq_len=256, batch_size=16, marks=marks),
        optim=OptimConfig(**rate),
        train=TrainConfig(steps=steps, eval_every=100, eval_batches=12, sample_prompt="It was"),
    )


def transformer(d_model: int, n_layers: int, window: int = 256, **changes: Any) -> TransformerConfig:
    """A baseline without units: a Qwen3-style model whose layers see `window` tokens back."""
    options = {"vocab_size": 264, "bos_id": 256, "eos_ids": (257,), "pad_id": 258} | changes
    heads = d_model // 64
    return TransformerConfig(
        family="qwen3", d_model=d_model, n_layers=n_layers, n_heads=heads, n_kv_heads=heads, head_dim=64,
        d_ff=-(-d_model * 8 // 3 // 64) * 64, layer_types=("sliding",) * n_layers, sliding_window=window,
        max_length=65536, remat=True, **options,
    )  # fmt: skip


def quick() -> Experiment:
    exp = entropy_ngrams()
    return dataclasses.replace(exp, train=dataclasses.replace(exp.train, steps=550))


def base() -> Experiment:
    return experiment(units(router(5.0, 0.26), ("T2", "T4", "T2"), (256, 384)), steps=1500)


def hnet() -> Experiment:
    return experiment(units(router(5.0, 0.26)))


def hnet_ngrams() -> Experiment:
    return experiment(units(router(5.0, 0.26), ngrams=(2, 3), ngram_rows=8192))


def hnet2() -> Experiment:
    layout, window = ("T1", "T1", "T2", "T1", "T1"), (63, 63, -1)
    return experiment(units((router(3.0, 0.4), router(2.0, 0.6)), layout, (160, 192, 256), window))


def hnet_mamba() -> Experiment:
    model = units(router(5.0, 0.26), ("m1", "T2", "m2"))
    return experiment(dataclasses.replace(model, ssm=Mamba2Config(d_state=32, chunk=64)))


def gumbel() -> Experiment:
    return sampled(Predictor(prior=0.2))


def sampled(rule: Predictor, capacity: float = 0.26, **changes: Any) -> Experiment:
    """Dynamic token pooling with random ends. The predictor learns ten times as fast as the rest: next to the noise,
    what it says must soon count for something."""
    return experiment(units(pooled(rule, capacity), **changes), groups=(Group("stage0/rule/.*", 10.0),))


def unigram() -> Experiment:
    return experiment(units(pooled(Predictor(supervision="marks"), 0.26)), marks="unigram:1024")


def entropy() -> Experiment:
    return experiment(units(pooled(Predictor(supervision="entropy"), 0.35), ("T1", "T1", "T2")))


def entropy_ngrams() -> Experiment:
    chunks = pooled(Predictor(supervision="entropy"), 0.35)
    return experiment(units(chunks, ("T1", "T1", "T2"), ngrams=(2, 3), ngram_rows=8192))


def magnet() -> Experiment:
    """For the parallel texts (`make parallel`): one predictor per script. Their priors make as many units of the same
    pages in every language: `python -m atom_jax fairness --source=corpora/parallel --scripts=latin,cyrillic,kana,han`
    finds them, with English at 0.2."""
    scripts = ("latin", "cyrillic", "kana", "han")
    rule = Predictor(prior=0.2, hidden=96, scripts=scripts, priors=(0.2, 0.101, 0.103, 0.221))
    return parallel(sampled(rule, 0.3, window=(15, -1)))


def shared() -> Experiment:
    """What `magnet` is compared with: one predictor for all scripts, and in all as many units."""
    return parallel(sampled(Predictor(prior=0.19), 0.3, window=(15, -1)))


def bpe_parallel() -> Experiment:
    return parallel(bpe(), tokenizer="bpe:2048")


def parallel(exp: Experiment, **changes: Any) -> Experiment:
    """The same on texts in seven languages (`make parallel`)."""
    sources = tuple(f"corpora/parallel/{language}" for language in ("de", "en", "es", "fr", "ja", "ru", "zh"))
    data = dataclasses.replace(exp.data, sources=sources, weights=(1.0,) * len(sources))
    train = dataclasses.replace(exp.train, sample_prompt="")
    model = exp.model
    if "tokenizer" in changes:
        model = dataclasses.replace(model, vocab_size=int(changes["tokenizer"].split(":")[1]))
    return dataclasses.replace(exp, model=model, data=data, train=train, **changes)


def dna() -> Experiment:
    """Genomes of bacteria, validated on another genus (`make dna`)."""
    exp = hnet()
    data = dataclasses.replace(exp.data, sources=("corpora/dna",))
    return dataclasses.replace(exp, data=data, train=dataclasses.replace(exp.train, sample_prompt=""))


def blt() -> Experiment:
    chunks = pooled(Entropy(threshold=1.6), 0.3, pool="max", upsample="cross_attention", heads=3)
    return experiment(units(chunks, ("T1", "T1", "T1")))


def words() -> Experiment:
    return experiment(units(pooled(Spaces(style="whitespace"))))


def spacebyte() -> Experiment:
    return experiment(units(pooled(Spaces(style="spacebyte"), pool="last")))


def hat() -> Experiment:
    chunks = pooled(Symbol(id=HAT_WORD_END), 0.25, pool="attention", slots=2, heads=3, upsample="cross_attention")
    return experiment(units(chunks, ("T1", "T1", "T1")), tokenizer="hat")


def megabyte() -> Experiment:
    chunks = pooled(Fixed(stride=4, phase="block"), 0.27, pool="concat", upsample="slots", max_positions=4)
    return experiment(units(chunks, ("T1", "T1", "T1")))


def bytes_() -> Experiment:
    return experiment(transformer(192, 4))


def bytes_ngrams() -> Experiment:
    """A transformer over bytes with the same n-gram embeddings as the models with units: what those alone bring."""
    return experiment(units((), ("T4",), (192,), (255,), ngrams=(2, 3), ngram_rows=8192))


def bpe() -> Experiment:
    model = transformer(320, 4, vocab_size=1024, bos_id=0, eos_ids=(1,), pad_id=2)
    exp = experiment(model, tokenizer="bpe:1024")
    # About as many bytes per step as the others have: a token is 2.9 bytes of these novels.
    return dataclasses.replace(exp, data=dataclasses.replace(exp.data, seq_len=128, batch_size=11))


def hnet_1stage_xl() -> Experiment:
    return released((1024, 2048), ("m4", "T24", "m4"), (0, 5504), (6.0,))


def hnet_2stage_xl() -> Experiment:
    return released((1024, 1536, 2048), ("m4", "T1m4", "T27", "m4T1", "m4"), (0, 4096, 5504), (3.0, 3.0))


def released(d_model: tuple, layout: tuple, d_intermediate: tuple, targets: tuple) -> Experiment:
    """An H-Net of published size with its recipe (Hwang et al., 2025, section 3.1, as far as the released code and
    documents say): rows of 8,192 bytes, AdamW, a trapezoid schedule, learning-rate factors per stage. Point
    data.sources at your own corpus."""
    model = HNetConfig(
        layout=layout, d_model=d_model, d_intermediate=d_intermediate, n_heads=(16,) * len(d_model),
        rotary_dim=tuple(d // 32 for d in d_model), window=(1023,) * (len(d_model) - 1) + (-1,),
        chunking=tuple(chunking(n, 1.25 / n, pack=True) for n in targets), dtype="bfloat16", remat=True,
    )  # fmt: skip
    factors = lr_factors(d_model, targets)
    groups = tuple(Group(rf"(un)?embed|stage{s}/.*" if s == 0 else f"stage{s}/.*", f) for s, f in enumerate(factors))
    return Experiment(
        model=model,
        tokenizer="hnet_bytes",
        data=DataConfig(sources=("austen",), seq_len=8192, batch_size=256),
        optim=OptimConfig(learning_rate=5e-4, schedule="wsd", warmup_steps=4800, final_fraction=0.0, groups=groups),
        train=TrainConfig(steps=48000, eval_every=1000),
    )


def tiny() -> Experiment:
    model = units(router(4.0, 0.5), ("T1", "T1", "T1"), (32, 64), (31, -1), ngrams=(3,), ngram_rows=256)
    model = dataclasses.replace(model, n_heads=(2, 2), rotary_dim=(16, 16), remat=False)
    exp = experiment(model, steps=20, learning_rate=3e-3)
    data = dataclasses.replace(exp.data, seq_len=64, batch_size=8)
    train = dataclasses.replace(exp.train, log_every=1, eval_every=10, eval_batches=2, sample_tokens=16)
    return dataclasses.replace(exp, data=data, train=train)


VARIANTS = {
    f.__name__.rstrip("_"): f
    for f in (
        quick, base, hnet, hnet_ngrams, hnet2, hnet_mamba, gumbel, unigram, entropy, entropy_ngrams, magnet, shared,
        blt, words, spacebyte, hat, megabyte, bytes_, bytes_ngrams, bpe, bpe_parallel, dna, hnet_1stage_xl,
        hnet_2stage_xl, tiny,
    )
}  # fmt: skip
