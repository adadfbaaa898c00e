"""Small models that cover every boundary rule, pool, mixing, upsampling and residual, and text for them."""

import dataclasses
import functools

import jax
import numpy as np

from atom_jax import params
from atom_jax.models import hnet
from atom_jax.models.hnet import HNetConfig
from atom_jax.models.hnet.examples import examples
from atom_jax.typing import Batch

MODELS = examples()
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
