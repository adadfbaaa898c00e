"""What generation and scoring need, said without running them."""

import dataclasses

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.aot.generation import described, generation
from atom_jax.aot.scoring import scoring
from atom_jax.aot.topology import GIB, Chip
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.sharding import MeshConfig
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

CFG = TransformerConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48, max_length=4096)


@pytest.fixture(scope="module")
def report():
    return generation(LM(CFG, None, None), 4, 100, "cpu:8", MeshConfig(tensor=2))


def test_generation(report):
    before = len(jax.live_arrays())
    again = generation(LM(CFG, None, None), 4, 100, "cpu:8", MeshConfig(tensor=2))
    assert len(jax.live_arrays()) == before
    assert list(again.programs) == ["prompt", "token"] and again.fits
    whole = 4 * params.count(transformer.spec(CFG)) / GIB
    assert whole / 2 < report.parameters < 0.6 * whole
    prompt, token = report.programs.values()
    # One row and one head each of keys and values, for 100 tokens and 128 new ones; the step takes them as they lie.
    cache = 2 * CFG.n_layers * bucket(228, 256) * 16 * 4 / GIB
    assert prompt.new == pytest.approx(cache, rel=0.2)
    assert cache + report.parameters < token.arguments < cache + report.parameters + 1e-4
    assert prompt.traffic.total > 0
    text = str(report)
    assert "8 x cpu (data 4, fsdp 1, context 1, tensor 2), 4 rows with prompts of 100 tokens" in text
    assert "prompt" in text and "sent" in text and "to do" not in text


def test_where_it_does_not_fit(report):
    small = dataclasses.replace(report, chip=Chip(report.parameters * 1.5, 1e12))
    assert not small.fits and "does not fit" in str(small) and "more chips on mesh.tensor" in str(small)
    total = max(one.total for one in report.programs.values())
    assert "fewer or shorter rows" in str(dataclasses.replace(report, chip=Chip(total * 0.9, 1e12)))


def test_learned_evictors_read_prompts_in_parts():
    lm = LM(dataclasses.replace(CFG, memory=DMS(window=16, cr=8.0)), None, None)
    found = generation(lm, 2, 3000, "cpu:1")
    assert list(found.programs) == ["1024 of a prompt", "token"]
    assert "of which every head keeps 391" in str(found)
    dense = generation(LM(CFG, None, None), 2, 3000, "cpu:1")
    assert found.programs["token"].arguments < dense.programs["token"].arguments


def test_a_sequence_too_long_or_empty():
    for rows, length in ((1, 4096), (1, 0), (0, 5)):
        with pytest.raises(AtomError, match="at least one row of 1 to 4095 tokens"):
            generation(LM(CFG, None, None), rows, length, "cpu:1")


@pytest.mark.parametrize("name", ["configs/units.py:tiny", "configs/bolmo.py:tiny"])
def test_models_of_units(name):
    found = generation(described(None, name), 2, 50, "cpu:1")
    assert found.fits and set(found.programs) == {"prompt", "token"}


def test_scoring():
    cfg = config.override(EvalConfig(), ["max_length=64", "batch_tokens=1024"])
    found = scoring(LM(CFG, None, None), cfg, "cpu:8")
    assert list(found.programs) == ["states", "scores"] and "8 x cpu" in str(found)
    assert "16 rows of 64 tokens" in str(found)
    assert found.programs["scores"].total > found.programs["scores"].new > 0


def test_the_commands(tmp_path, capsys):
    lm = LM(CFG, params.init(jax.random.key(3), transformer.spec(CFG)), ByteTokenizer())
    atom_jax.save_hf(lm, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    flags = ["--compile_only", "--topology=cpu:1", "--rows=2", "--length=40"]
    code = main(["", "generate", f"--checkpoint={tmp_path / 'hf'}", "--memory=tova:budget=16", *flags])
    assert code == 0 and f"{params.count(lm.params):,} parameters on 1 x cpu" in capsys.readouterr().out
    code = main(["", "generate", *flags])
    assert code == 1 and "expected either --checkpoint or --config" in capsys.readouterr().err


def test_the_real_compiler():
    pytest.importorskip("libtpu")
    found = generation(LM(dataclasses.replace(CFG, head_dim=128), None, None), 2, 100, "v5e:2x2")
    assert found.fits and np.isfinite(found.programs["token"].total)
