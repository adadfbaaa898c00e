"""Small models that cover every boundary rule, pool, mixing, upsampling and residual, and text for them."""

import dataclasses
import functools

import jax
import numpy as np

from atom_jax import params
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.entropy import Entropy
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.models import hnet
from atom_jax.models.hnet import HNetConfig
from atom_jax.nn.ssd import Mamba2Config
from atom_jax.typing import Batch

SMALL = ByteModel(d_model=16, n_layers=1, n_heads=2, d_ff=16, window=4)
SCRIPTS = Predictor(scripts=("latin", "cyrillic"), priors=(0.3, 0.2))
HNET = {"rule": Cosine(target=2.0), "mix": "ema", "confidence": True}


def model(*chunking: dict, layout=("m1", "T1", "m1"), d=(16, 16), window=(5, -1)) -> HNetConfig:
    n = len(d)
    return HNetConfig(
        vocab_size=264, layout=layout, d_model=d, d_intermediate=(24,) * n, n_heads=(2,) * n, rotary_dim=(4,) * n,
        window=window, ssm=Mamba2Config(d_state=8, head_dim=16, chunk=4), bos_id=256, eos_ids=(), init_std=0.3,
        chunking=tuple(Chunking(**{"capacity": 1.0} | c) for c in chunking), max_length=512,
    )  # fmt: skip


TWO = {"d": (16, 16, 24), "window": (5, 3, -1)}
MODELS = {
    "hnet": model(HNET | {"pack": True}),
    "hnet-2": model(HNET, HNET, layout=("m1", "T1m1", "T2", "m1T1", "m1"), **TWO),
    "gumbel": model(
        {"rule": Predictor(), "pool": "mean", "residual": "identity", "norm": True, "pack": True},
        layout=("x1", "x2", "x1"),
    ),
    "magnet": model({"rule": SCRIPTS, "pool": "max", "mix": "ema"}, layout=("t1", "M1", "t1")),
    "unigram": model(
        {"rule": Predictor(supervision="marks"), "pool": "last", "residual": "none", "confidence": True}
    ),
    "spikes": model({"rule": Predictor(supervision="entropy"), "pool": "mean"}, layout=("T1", "M2", "T1")),
    "words": model(
        {"rule": Spaces(), "pool": "attention", "slots": 2, "heads": 2, "upsample": "cross_attention"},
        layout=("t1", "T1", "t1"), d=(16, 24),
    ),
    "spacebyte": model({"rule": Spaces(style="spacebyte"), "pool": "attention", "heads": 2, "residual": "identity"}),
    "blt": model(
        {"rule": Entropy(threshold=1.0, model=SMALL), "pool": "max", "upsample": "cross_attention", "heads": 2},
        layout=("t1", "T1", "t1"),
    ),
    "blt-both": model(
        {"rule": Entropy(mode="both", threshold=0.7, max_length=3, model=SMALL), "pool": "concat", "max_positions": 2}
    ),
    "megabyte": model(
        {"rule": Fixed(3), "pool": "concat", "max_positions": 3, "upsample": "slots", "pack": True}, d=(16, 24)
    ),
    "fixed-gumbel": model(
        {"rule": Fixed(2, phase="dynpool"), "pool": "mean"}, {"rule": Predictor(), "pool": "max", "mix": "ema"},
        layout=("m1", "t1", "T1", "m1", "t1"), **TWO,
    ),
    "hat": model({"rule": Symbol(id=259), "pool": "attention", "heads": 2, "upsample": "slots"}),
    "words-hnet": model(
        {"rule": Spaces(), "pool": "mean", "pack": True}, HNET | {"pack": True},
        layout=("m1", "m1", "T1", "m1", "t1"), **TWO,
    ),
}  # fmt: skip
TEXT = "a кот.Дe  xy!é at иg \nः 9b? so it is, на д "


@functools.cache
def weights(cfg: HNetConfig):
    """Random weights with which decisions differ between positions and everything matters."""
    p = params.flatten(params.init(jax.random.key(1), hnet.spec(cfg)))
    keys = jax.random.split(jax.random.key(2), len(p))
    for key, (name, x) in zip(keys, p.items()):
        own = name.split("/")[-1]
        if "rule/" in name and own in ("q", "k") and x.ndim == 2:
            p[name] = x + 0.5 * jax.random.normal(key, x.shape)
        elif name.endswith(("rule/hidden", "rule/out")):
            p[name] = 30 * x
        elif name.endswith("rule/out_bias"):
            p[name] = 0 * x + (0.3 if "stage0" in name else -0.6)
        elif name.endswith("rule/threshold"):
            p[name] = 0 * x
        elif "rule/" in name:
            p[name] = 3 * x
        elif own in ("in_proj", "out_proj", "qkv", "o", "r", "up", "down", "null", "join", "part", "unembed"):
            p[name] = 5 * x
        elif own in ("lift", "b", "w") and x.ndim < 3 and "norm" not in name:
            p[name] = x + 0.3 * jax.random.normal(key, x.shape)
    return params.unflatten(p)


def stream(n: int, start: int = 0) -> np.ndarray:
    """i32 [n] bytes of a text of two scripts, in which some spaces are the symbol that ends a word."""
    ids = np.frombuffer((TEXT * 8).encode(), np.uint8).astype(np.int32)[start : start + n]
    spaces = np.cumsum(ids == 32)
    return np.where((ids == 32) & (spaces % 2 == 0), 259, ids)


def rows(documents: list[list[np.ndarray]], t: int, left: int = 0) -> Batch:
    """A batch of rows of t positions, each with some documents side by side after `left` positions of padding."""
    ids, positions, segments = (np.zeros((len(documents), t), np.int32) for _ in range(3))
    for r, row in enumerate(documents):
        at = left
        for number, document in enumerate(row):
            here = slice(at, at + len(document))
            ids[r, here], positions[r, here], segments[r, here] = document, np.arange(len(document)), number + 1
            at += len(document)
    return Batch(ids, positions, segments)


def capacity(cfg: HNetConfig, value: float) -> HNetConfig:
    """cfg with room for so many chunks per position in every stage."""
    return dataclasses.replace(cfg, chunking=tuple(dataclasses.replace(c, capacity=value) for c in cfg.chunking))
