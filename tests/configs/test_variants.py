"""Every variant of configs/units.py describes a model, its data and an optimiser that fits it."""

import re

import pytest

from atom_jax import config, params
from atom_jax.models import registry
from atom_jax.training import optim
from configs import units

BYTES_PER_BPE_TOKEN = 2.9
BASELINE = registry.of(units.bytes_().model).flops(units.bytes_().model, 256)


@pytest.mark.parametrize("name", units.VARIANTS)
def test_variant_is_complete(name):
    exp = config.load_file(f"configs/units.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    spec = registry.of(exp.model).spec(exp.model)
    optim.make(exp.optim, spec, exp.train.steps)
    # What its docstring says of the small ones: no more compute per byte than the baseline over bytes.
    flops = registry.of(exp.model).flops(exp.model, exp.data.seq_len)
    if "bpe" in name:
        flops /= BYTES_PER_BPE_TOKEN
    assert flops <= 1.02 * BASELINE or name in ("base", "hnet_1stage_xl", "hnet_2stage_xl")


def test_learning_rate_factors_are_the_documented_ones():
    groups = units.hnet_2stage_xl().optim.groups
    assert [round(g.factor, 2) for g in groups] == [3.03, 1.43, 0.71]
    assert [round(g.factor, 2) for g in units.hnet_1stage_xl().optim.groups] == [3.03, 0.88]


def test_official_decay_leaves_out_biases_and_the_gated_norm():
    spec = params.flatten(registry.of(units.hnet_1stage_xl().model).spec(units.hnet_1stage_xl().model))
    left = {name.split("/", 1)[1] for name in spec if not re.fullmatch(units.HNET_OFFICIAL_DECAY, name)}
    assert left == {f"{s}/0/mixer/{p}" for s in ("encoder", "decoder") for p in ("conv_b", "norm")} | {"residual/b"}
