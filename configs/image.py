"""Tokenizers of images whose number of tokens is flexible (docs/images.md), and classifiers of images, on which token
reduction is measured (docs/reduction.md).

    python train.py --config=configs/image.py:flex --workdir=runs/flex
    python -m atom_jax tokens --checkpoint=runs/flex --image=a.png --error=0.003 --out=tokens.png

flex     any first k of 16 tokens, and one encoding for all of them (FlexTok); the other variants differ in that:
fixed    always 16 tokens: the baseline.
elastic  any first k tokens, and the encoder is told k (ElasticTok).
alit     4 more tokens in each of 4 rounds (ALIT).
karl     as many as the encoder finds necessary for an error that is given (KARL).
glyphs   flex on the letters and signs of three fonts.
emoji    flex on emoji in colours, 32 x 32 pixels (`make emoji` first).
tiny     seconds; for tests.

    python train.py --config=configs/image.py:cct --workdir=runs/cct
    python eval.py --checkpoint=runs/cct --tasks=reduction --out=runs/reduction.json

cct           a compact convolutional transformer that reads scikit-learn's digits (pip install 'atom-jax[vision]').
cct_numerals  the same on numerals that are drawn, which needs nothing.
cct_tiny      seconds; for tests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.data.config import DataConfig
from atom_jax.models.cct import CCTConfig
from atom_jax.models.image_tokens import FSQ, Halting, ImageTokensConfig, Nested, Rounds, Told, Whole
from atom_jax.training.config import Experiment, OptimConfig, TrainConfig
from atom_jax.training.objectives import Classify, Images

SHAPES = "image:shapes:size=16:most=6"
# As many codes as the codebook that ALIT and KARL have (VQ), of which so small a model soon uses a few only.
SCALAR = FSQ((8, 8, 8, 8))


def tokenizer(source: str = SHAPES, steps: int = 3000, batch_size: int = 48, **changes: Any) -> Experiment:
    """A tokenizer of the images of a source."""
    model = ImageTokensConfig(**changes)
    return Experiment(
        model=model, tokenizer="pixels", objective=Images(),
        data=DataConfig(sources=(source,), seq_len=model.max_length, batch_size=batch_size, whole=True),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=100, final_fraction=0.02, weight_decay=0.01),
        train=TrainConfig(steps=steps, log_every=20, eval_every=600, eval_batches=8),
    )  # fmt: skip


def flex() -> Experiment:
    return tokenizer()


def fixed() -> Experiment:
    return tokenizer(length=Whole())


def elastic() -> Experiment:
    return tokenizer(length=Told(), mask="full", quantiser=FSQ(bound="elastic"))


def alit() -> Experiment:
    return tokenizer(length=Rounds(4), mask="full", quantiser=SCALAR)


def karl() -> Experiment:
    return tokenizer(length=Halting(), mask="full", quantiser=SCALAR)


def glyphs() -> Experiment:
    return tokenizer("image:glyphs:size=16")


def emoji() -> Experiment:
    return tokenizer("image:corpora/emoji/emoji.npz", size=32, channels=3, registers=32)


def tiny() -> Experiment:
    sizes = {"size": 8, "registers": 4, "d_model": 16, "d_ff": 32, "n_heads": 2, "encoder_layers": 1}
    exp = tokenizer("image:shapes:size=8", 20, 8, decoder_layers=1, length=Nested("pow2"), **sizes)
    train = TrainConfig(steps=20, log_every=5, eval_every=10, eval_batches=2, checkpoint_every=10)
    return dataclasses.replace(exp, train=train)


def cct(source: str = "digits") -> Experiment:
    """8 x 8 pixels, a token for each, 0.05 million parameters."""
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
    return cct("numerals")


def cct_tiny() -> Experiment:
    exp = cct_numerals()
    model = dataclasses.replace(exp.model, convolutions=1, d_model=16, d_ff=24, n_layers=2, n_heads=2)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=4)
    train = TrainConfig(steps=24, log_every=1, eval_every=12, eval_batches=1, checkpoint_every=12)
    data = dataclasses.replace(exp.data, batch_size=16)
    return dataclasses.replace(exp, model=model, data=data, optim=optim, train=train)


VARIANTS = {
    "flex": flex, "fixed": fixed, "elastic": elastic, "alit": alit, "karl": karl, "glyphs": glyphs, "emoji": emoji,
    "tiny": tiny, "cct": cct, "cct_numerals": cct_numerals, "cct_tiny": cct_tiny,
}  # fmt: skip
