"""configs/transfer.py: what is frozen, and what is read."""

import pytest

from atom_jax import config, params
from atom_jax.models import registry
from atom_jax.training import optim
from configs import transfer


@pytest.mark.parametrize("name", transfer.VARIANTS)
def test_variants_are_written_and_read(name):
    exp = config.load_file(f"configs/transfer.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    assert bool(exp.data.tokens) == exp.objective.spelled


def test_the_teacher_of_llama_is_frozen_and_its_layers_are_shared():
    exp = transfer.alm_8b()
    exp.objective.check(exp)
    spec = registry.of(exp.model).spec(exp.model) | exp.objective.extra_spec(exp.model)
    factors = optim.make(exp.optim, spec, exp.train.steps).factors
    learn = {name for name, factor in factors.items() if factor}
    assert {name.split("/")[0] for name in learn} == {"embed", "unembed", "layers"}
    assert all("lora" in name for name in learn if name.startswith("layers/"))
    assert set(spec["source"]) == {"embed", "unembed"} and params.count(spec) < 9.6e9
