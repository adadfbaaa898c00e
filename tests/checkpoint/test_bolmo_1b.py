"""A checkpoint of Bolmo-1B's size through the disk, with ATOM_LARGE=1: minutes, and 12 GB of disk."""

import hashlib
import os
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.models import bolmo
from atom_jax.models.bolmo import published
from atom_jax.typing import LM
from benchmarks.worker import peak_bytes
from tests.checkpoint.test_bolmo_hf import RELEASED, released

pytestmark = pytest.mark.skipif(not os.environ.get("ATOM_LARGE"), reason="1.5 billion parameters: set ATOM_LARGE=1")


def drawn(cfg, dtype):
    """Parameters of a configuration, uniform in [-1/2, 1/2)."""
    rng, shapes = np.random.default_rng(0), params.flatten(params.abstract(bolmo.spec(cfg), dtype))
    return params.unflatten(
        {k: jnp.asarray((rng.random(s.shape, np.float32) - 0.5).astype(s.dtype)) for k, s in shapes.items()}
    )


def digests(p):
    return {k: (x.dtype, hashlib.sha256(np.asarray(x).reshape(-1).view(np.uint8)).hexdigest()) for k, x in p.items()}


def files(directory):
    out = {}
    for path in sorted(directory.glob("*")):
        with path.open("rb") as f:
            out[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return out


# The mark of the most memory never falls: the smaller one comes first.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_of_the_released_size_goes_through_the_disk(dtype, tmp_path, capsys):
    began = time.perf_counter()
    cfg = published.from_hf(released("1B") | {"dtype": dtype}, "1B")
    p = drawn(cfg, jnp.dtype(dtype))
    expected = digests(params.flatten(p))
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        first, second = tmp_path / folder / "first", tmp_path / folder / "second"
        atom_jax.save_hf(LM(cfg, p, None), first)
        del p
        again = atom_jax.load(first)
        assert params.count(bolmo.spec(again.config)) == RELEASED["1B"][-1]
        assert digests(params.flatten(again.params)) == expected
        atom_jax.save_hf(again, second)
        assert files(first) == files(second)
    with capsys.disabled():
        print(f"\n{dtype}: {time.perf_counter() - began:.0f} s, peak of memory {peak_bytes() / 1e9:.1f} GB")
    assert peak_bytes() < 24e9
