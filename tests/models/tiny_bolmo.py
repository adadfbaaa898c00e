"""The tiny Bolmo whose weights and outputs the official code made (tests/golden/bolmo)."""

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

import atom_jax
from atom_jax.models import bolmo
from atom_jax.typing import LM, Batch

DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "golden" / "bolmo"
NAMES = ("compound", "code", "mixed", "cyr_arab", "short", "long")


@functools.cache
def model() -> LM:
    """The model; its tokenizer's subwords are in a directory of their own, as config.json says."""
    return atom_jax.load(DIRECTORY)


@functools.cache
def numbers() -> dict[str, np.ndarray]:
    """What the official code made of six texts, "CASE.NAME"."""
    return load_file(DIRECTORY / "io.safetensors")


@functools.cache
def texts() -> dict[str, str]:
    """The six texts."""
    return json.loads((DIRECTORY / "meta.json").read_text())["texts"]


def ids_of(name: str) -> np.ndarray:
    """i32 [t]: the ids of a text, bos first."""
    return numbers()[f"{name}.input_ids"][0].astype(np.int32)


def batch(rows, left=False, lm=None) -> Batch:
    """Rows of ids in one batch, padded on the right or on the left to 1 or to a multiple of 64 positions."""
    t = max(map(len, rows))
    t = t if t == 1 else -(-t // 64) * 64
    ids, mask = np.zeros((len(rows), t), np.int32), np.zeros((len(rows), t), bool)
    for row, i, m in zip(rows, ids, mask):
        at = slice(t - len(row), t) if left else slice(0, len(row))
        i[at], m[at] = row, True
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    lm = lm or model()
    suffix = bolmo.codec(lm.config).suffix(lm.tokenizer, ids, mask)
    return Batch(ids, positions, mask.astype(np.int32), suffix=suffix)
