"""The adapters that come with the package."""

import pathlib

import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import adapters

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"


def test_they_are_small_and_have_cards():
    assert {"smollm2-135m-dms-4x", "smollm2-135m-dms-8x"} <= set(adapters.shipped())
    for name in adapters.shipped():
        assert (adapters.SHIPPED / name / "README.md").is_file()
        assert sum(p.stat().st_size for p in (adapters.SHIPPED / name).iterdir()) < 5_000_000


@pytest.mark.skipif(not MODEL.is_dir(), reason="needs SmolLM2-135M-Instruct: run `make smollm2`")
def test_the_stricter_one_holds_less_on_a_real_text():
    text = (pathlib.Path(atom_jax.__file__).parent / "models" / "transformer.py").read_text()
    held = []
    for name in ("smollm2-135m-dms-4x", "smollm2-135m-dms-8x"):
        lm = atom_jax.load(MODEL, adapter=name)
        ids = lm.tokenizer.encode(text)[None, :512]
        held.append(float(np.mean(atom_jax.apply(lm, ids).aux["occupancy"])))
    assert 132 < held[1] < held[0] < 400
