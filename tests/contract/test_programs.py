"""What a model needs on chips is said without its parameters (`--compile_only`): one example of every family."""

import dataclasses

import pytest

from atom_jax import params
from atom_jax.aot.generation import generation
from atom_jax.models import registry
from tests.contract import cells


@pytest.mark.parametrize("name", cells.first_of_each(lambda cfg: cfg.family))
def test_compile_only(name):
    lm = dataclasses.replace(cells.example(name), params=None)
    report = generation(lm, 2, 11, "cpu:1")
    size = 4 * params.count(registry.of(lm.config).spec(lm.config)) / 2**30
    assert report.fits and report.parameters == pytest.approx(size)
    assert all(one.total > report.parameters for one in report.programs.values())
    assert [*report.programs][-1] == "token"
