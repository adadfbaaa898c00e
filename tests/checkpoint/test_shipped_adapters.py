"""The adapters that come with the package."""

import hashlib
import pathlib
import shutil

import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import adapters
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.typing import AtomError

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"


def test_they_are_small_and_have_cards():
    assert set(DIGESTS) == set(adapters.shipped())
    for name in adapters.shipped():
        assert (adapters.SHIPPED / name / "README.md").is_file()
        assert sum(p.stat().st_size for p in (adapters.SHIPPED / name).iterdir()) < 5_000_000


# SHA-256 of the names, dtypes, shapes and bytes of their tensors.
DIGESTS = {
    "reason-subset-dms-4x": "f56413f631a8b9e4adf2724a7da3e1dcf00438df075116125c83f3df44aa28bb",
    "reason-subset-dms-8x": "aee454e9dbe0f80190c28c6240481da3921b4703670fc48a500c9912fcb0d3f2",
    "smollm2-135m-dms-4x": "e26c30a70c391472e8276712ebdc45b0a6a7c1adb708126913d8252e9734ce37",
    "smollm2-135m-dms-4x-v1": "a0f94c40920f6a8a8169fdd700e9f8cda5ee9047277c0ef05e2c44933278917a",
    "smollm2-135m-dms-4x-v2": "3e55cb95caecb4119c2223a86de66dab2f52e6e98fc2e9e1e769eae73d0a820d",
    "smollm2-135m-dms-8x": "634b5c8b99969093f56463a3e2173fcddc947b6d40b43d1ec348709d589a55ce",
    "smollm2-135m-dms-8x-v1": "e0d3daf338582d82034178ca1bc08d8146660874c72fd6514a77e1be87331af8",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_they_are_what_was_measured_and_damage_is_seen(name, tmp_path):
    file = shutil.copy(adapters.SHIPPED / name / adapters.TENSORS, tmp_path)
    source = SafetensorsSource(file)
    digest = hashlib.sha256()
    for tensor in sorted(source.infos):
        x = source.read(tensor)
        digest.update(tensor.encode() + str(x.dtype).encode() + str(x.shape).encode() + x.tobytes())
    assert digest.hexdigest() == DIGESTS[name] and set(source.crcs) == set(source.infos)
    with open(file, "r+b") as f:
        f.seek(-3, 2)
        byte = f.read(1)[0]
        f.seek(-3, 2)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(AtomError, match="is not what was written"):
        for tensor in source.infos:
            source.read(tensor)


@pytest.mark.skipif(not MODEL.is_dir(), reason="needs SmolLM2-135M-Instruct: run `make smollm2`")
def test_the_stricter_one_holds_less_on_a_real_text():
    text = (pathlib.Path(atom_jax.__file__).parent / "models" / "transformer.py").read_text()
    held = []
    for name in ("smollm2-135m-dms-4x", "smollm2-135m-dms-8x"):
        lm = atom_jax.load(MODEL, adapter=name)
        ids = lm.tokenizer.encode(text)[None, :512]
        held.append(float(np.mean(atom_jax.apply(lm, ids).aux["occupancy"])))
    assert 132 < held[1] < held[0] < 400
