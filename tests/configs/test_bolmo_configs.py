"""Bolmo: the recipes are complete, and the smallest one trains, is loaded and writes."""

import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.models import registry
from atom_jax.training import loop, optim, start
from atom_jax.training.record import read
from configs import bolmo, units


@pytest.mark.parametrize("name", bolmo.VARIANTS)
def test_variant_is_complete(name):
    exp = config.load_file(f"configs/bolmo.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    optim.make(exp.optim, registry.of(exp.model).spec(exp.model), exp.train.steps)
    if exp.byteify is not None:
        return
    # No dearer than the baseline of configs/units.py.
    cost = registry.of(exp.model).flops(exp.model, exp.data.seq_len)
    assert 2 * params.count(registry.of(exp.model).spec(exp.model)["decoder"]) < cost
    assert cost < 1.02 * registry.of(units.bytes_().model).flops(units.bytes_().model, 256)


@pytest.mark.parametrize("name, size", [("bolmo_1b", 1_468_911_776), ("bolmo_7b", 7_633_084_576)])
def test_published_recipes(name, size):
    exp = bolmo.VARIANTS[name]()
    spec = registry.of(exp.model).spec(exp.model)
    assert params.count(spec) == size
    assert exp.first == bolmo.VARIANTS[f"{name}_stage1"]()
    first, second = (optim.make(e.optim, spec, e.train.steps) for e in (exp.first, exp))
    frozen = {k for k, factor in first.factors.items() if not factor}
    assert (
        frozen
        == {k for k, factor in second.factors.items() if factor == 0.5}
        == {k for k in first.factors if k.startswith("main/")}
    )
    # A linear rise over a tenth of the steps and a linear fall to nothing.
    steps, peak = exp.train.steps, exp.optim.learning_rate
    rates = [float(second.schedule(s)) / peak for s in (steps // 20, steps // 10, steps * 55 // 100, steps)]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-3)


def test_the_smallest_one_trains_and_writes(tmp_path, one_device):
    # Of six novels, the units of whole words take longer to find than all else here.
    for split in ("train", "validation"):
        (tmp_path / "text" / split).mkdir(parents=True)
        text = "".join(f"It was truth number {i}, universally acknowledged.\n" for i in range(300))
        (tmp_path / "text" / split / "a.txt").write_text(text)
    exp = start.configure("configs/bolmo.py:tiny", [f"data.sources={tmp_path / 'text'}"])
    result = loop.fit(exp, tmp_path / "run")
    lines = [x for x in read(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"]
    assert result.step == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < x["boundary_accuracy"] <= 1 for x in lines)
    lm = atom_jax.load(tmp_path / "run")
    assert lm.family == "bolmo" and lm.tokenizer.name == "bolmo"
    made = atom_jax.generate(lm, ["It was", "a"], 6)
    assert [len(row) for row in made.ids] == [6, 6]
