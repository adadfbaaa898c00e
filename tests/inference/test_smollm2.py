"""The real SmolLM2 weights against the official implementation's numbers."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import atom_jax
from atom_jax.inference import score

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
TEXTS = ("prose", "code", "mixed")
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="needs SmolLM2-135M-Instruct: run `make smollm2`")


@pytest.fixture(scope="module")
def lm():
    return atom_jax.load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def numbers(golden):
    directory = golden / "smollm2"
    return load_file(directory / "io.safetensors"), json.loads((directory / "meta.json").read_text("utf-8"))["texts"]


def test_losses_and_last_logits_equal_the_official_ones(lm, numbers):
    io, _ = numbers
    longest = max(len(io[f"{name}.ids"]) for name in TEXTS)
    ids = np.stack([np.pad(io[f"{name}.ids"], (0, longest - len(io[f"{name}.ids"]))) for name in TEXTS])
    mask = np.arange(longest) < np.array([[len(io[f"{name}.ids"])] for name in TEXTS])
    losses, logits = -np.asarray(score.logprobs(lm, ids, mask)), atom_jax.apply(lm, ids, mask).logits
    for row, name in enumerate(TEXTS):
        n = len(io[f"{name}.ids"])
        np.testing.assert_allclose(losses[row, : n - 1], io[f"{name}.nll"], atol=1e-3)
        np.testing.assert_allclose(logits[row, n - 1], io[f"{name}.last_logits"], atol=1e-2)


def test_greedy_continuations_equal_the_official_ones(lm, numbers):
    io, texts = numbers
    gen = atom_jax.generate(lm, [texts[name]["text"] for name in TEXTS], 32)
    assert gen.ids == [io[f"{name}.greedy32"].tolist() for name in TEXTS]
    assert gen.text == [texts[name]["greedy"] for name in TEXTS]
