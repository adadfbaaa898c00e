"""Bolmo from scratch: the recipes are complete, and the smallest one trains, is loaded and writes."""

import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.models import registry
from atom_jax.models.flops import forward_flops
from atom_jax.training import loop, optim, start
from atom_jax.training.record import read
from configs import bolmo, units


@pytest.mark.parametrize("name", bolmo.VARIANTS)
def test_variant_is_complete(name):
    exp = config.load_file(f"configs/bolmo.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    optim.make(exp.optim, registry.of(exp.model).spec(exp.model), exp.train.steps)
    cost = forward_flops(exp.model, exp.data.seq_len)
    assert 2 * params.count(registry.of(exp.model).spec(exp.model)["decoder"]) < cost
    assert cost < 1.02 * forward_flops(units.bytes_().model, 256)


def test_the_smallest_one_trains_and_writes(tmp_path):
    exp = start.configure("configs/bolmo.py:tiny", [])
    result = loop.fit(exp, tmp_path)
    lines = [x for x in read(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    assert result.step == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < x["boundary_accuracy"] <= 1 for x in lines)
    lm = atom_jax.load(tmp_path)
    assert lm.family == "bolmo" and lm.tokenizer.name == "bolmo"
    made = atom_jax.generate(lm, ["It was", "a"], 6)
    assert [len(row) for row in made.ids] == [6, 6]
