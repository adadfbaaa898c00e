"""Recurrent memory transformers are trained, from nothing and from a transformer."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.checkpoint import store
from atom_jax.models import registry, transformer
from atom_jax.training import loop, optim, start
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError
from configs import rmt

pytestmark = pytest.mark.usefixtures("one_device", "scanned")


@pytest.mark.parametrize("name", rmt.VARIANTS)
def test_variants_are_complete(name):
    exp = config.load_file(f"configs/rmt.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    optim.make(exp.optim, registry.of(exp.model).spec(exp.model), exp.train.steps)
    assert exp.data.seq_len > 2 * exp.model.segment


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("rmt")
    loop.fit(start.configure("configs/rmt.py:tiny", ["data.batch_size=4"]), workdir)
    return workdir


def test_it_learns_and_is_loaded(run):
    lines = [x for x in read(run / "metrics.jsonl") if x["kind"] == "train"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3 and not any(x["lost_tokens"] for x in lines)
    lm = atom_jax.load(run)
    assert lm.config == rmt.tiny().model and lm.params["memory"].shape == (2, 32)
    made = atom_jax.generate(lm, ["It was so. He was in the house"], 12, stop_ids=())
    assert len(made.ids[0]) == 12


def test_it_begins_with_a_transformer(tmp_path):
    exp = start.configure("configs/rmt.py:tiny", [])
    main = exp.model.main
    p = params.init(jax.random.key(5), transformer.spec(main))
    store.save_model(tmp_path / "model", LM(main, p, atom_jax.tokenizers.from_name("bytes")))
    found, notes = start.parameters(dataclasses.replace(exp, init_from=str(tmp_path / "model")), None)
    assert notes == ["init_from: main alone"] and found["memory"].shape == (2, 32)
    np.testing.assert_array_equal(found["main"]["embed"], p["embed"])
    other = dataclasses.replace(exp.model, main=dataclasses.replace(main, rope_theta=5e5))
    with pytest.raises(AtomError, match=r"the model's main is another one .*rope_theta"):
        start.parameters(dataclasses.replace(exp, model=other, init_from=str(tmp_path / "model")), None)
