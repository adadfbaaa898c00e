"""Every named shape becomes a program for a TPU on a machine that has none: block shapes and operations are right."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import aot
from pallas_kernels.dispatch import choose

TPU = AbstractMesh(
    (1,),
    ("chip",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
)


@pytest.mark.parametrize("name", aot.tpu())
def test_becomes_a_tpu_program(name):
    function, shapes = aot.tpu()[name]
    with jax.sharding.use_abstract_mesh(TPU):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("name", [name for name in aot.cuda() if "/triton_" in name])
def test_becomes_a_gpu_program(name):
    function, shapes = aot.cuda()[name]
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "evict_attention_forward" in text and "triton" in text


def test_every_operation_has_shapes_for_both_platforms():
    for specs in (aot.tpu(), aot.cuda()):
        assert {name.split("/")[0] for name in specs} == set(aot.operations())


def test_what_none_chooses():
    assert choose(None) == "reference"
    with jax.sharding.use_abstract_mesh(TPU):
        assert choose(None) == "tpu"
        assert choose("reference") == "reference"
