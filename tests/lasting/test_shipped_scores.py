"""The learned scores that come with the package."""

import hashlib
import pathlib

import numpy as np
import pytest

import atom_jax
from atom_jax.lasting import learned
from atom_jax.lasting.reader import model_of

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
# SHA-256 of their numbers.
DIGESTS = {"smollm2-135m": "0ff00a8ded13808adaa63de22d69950d34aa83f9055ff8442ae68567d80a19ab"}


def test_they_are_what_was_measured_and_have_cards():
    files = sorted(learned.SHIPPED.glob("*.safetensors"))
    assert {file.stem for file in files} == set(DIGESTS)
    for file in files:
        score = learned.load(file)
        assert learned.shipped(score.model) == file and file.with_suffix(".md").is_file()
        numbers = np.concatenate([score.mean, score.std, score.weight])
        assert hashlib.sha256(numbers.tobytes()).hexdigest() == DIGESTS[file.stem]
    assert learned.shipped("0" * 16) is None


@pytest.mark.skipif(not MODEL.is_dir(), reason="make smollm2")
def test_it_is_the_default_of_its_model(tmp_path):
    lm = atom_jax.load(MODEL)
    assert learned.shipped(model_of(lm).fingerprint) == learned.SHIPPED / "smollm2-135m.safetensors"
    with atom_jax.Memory.open(tmp_path / "m", lm) as memory:
        assert memory.settings.score == "learned"
