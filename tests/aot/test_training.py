"""What a step needs, said without running it."""

import dataclasses
import math

import jax
import pytest

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.aot.topology import Chip, per_chip
from atom_jax.aot.training import _Tokenizer, check, operations
from atom_jax.models import registry
from atom_jax.sharding import MeshConfig, make_mesh
from atom_jax.training.config import Group
from atom_jax.training.program import Program
from atom_jax.typing import AtomError
from configs import dms
from tests.training.tiny import make


@pytest.fixture(scope="module")
def report():
    return check(make("mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2"), "cpu:8")


def test_sizes_on_simulated_devices(report):
    before = len(jax.live_arrays())
    again = check(report.exp, "cpu:8")
    assert len(jax.live_arrays()) == before
    whole = 4 * report.count / 2**30
    # Matrices are cut in four, vectors stay whole; two moments of everything.
    assert whole / 4 < report.parameters < whole / 3.5
    assert report.moments == pytest.approx(2 * report.parameters, rel=1e-3)
    assert report.step.temporary > 0 and report.total >= report.parameters + report.moments + report.step.temporary
    assert report.chips == 8 and report.fits and report.free is None
    assert again.step.traffic == report.step.traffic
    assert {"all-gather", "all-reduce"} <= set(report.step.traffic.bytes)


def test_report_says_everything(report):
    text = str(dataclasses.replace(report, chip=Chip(1.0, 1e12)))
    assert (
        f"{report.count:,} parameters on 8 x cpu (data 1, fsdp 2, context 2, tensor 2), 8 rows of 32 tokens" in text
    )
    for words in ("optimiser state", "temporaries", "of 1: fits, 100% free", "at the peak rate", "all-gather"):
        assert words in text
    assert "to do" not in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"parameters": 1.0}, "parameters and optimiser take most of it: spread them"),
        ({"parameters": 0.0, "moments": 0.0}, "--set model.remat=true"),
    ],
)
def test_what_to_change_where_it_does_not_fit(report, change, words):
    small = dataclasses.replace(report, chip=Chip(report.total / 3, 1e12), **change)
    assert not small.fits and "does not fit" in str(small) and words in str(small)


def test_advice_for_activations(report):
    model = dataclasses.replace(report.exp.model, remat=True)
    exp = dataclasses.replace(report.exp, model=model)
    small = dataclasses.replace(report, exp=exp, parameters=0.0, moments=0.0, chip=Chip(report.total / 3, 1e12))
    assert small.advice().endswith("--set optim.accumulate=4")
    narrow = dataclasses.replace(
        small, exp=dataclasses.replace(exp, data=dataclasses.replace(exp.data, batch_size=2))
    )
    assert "--set mesh.context=8" in narrow.advice()
    refused = dataclasses.replace(
        narrow, programs={"step": dataclasses.replace(narrow.step, temporary=None, traffic=None)}
    )
    assert not refused.fits and "temporaries" not in str(refused)


def test_operations_of_plain_training(report):
    forward = registry.of(report.exp.model).flops(report.exp.model, 32) * report.tokens
    assert report.needed == report.executed == 3 * forward


def test_frozen_matrices_need_no_gradients_of_their_own():
    exp = make("model.remat=true")
    frozen = dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=(Group("layers/mlp/.*"),)))
    reports = [check(e, "cpu:1") for e in (exp, frozen)]
    spec = params_lib.flatten(registry.of(exp.model).spec(exp.model))
    matrices = sum(math.prod(s.shape) for k, s in spec.items() if "/mlp/" in k)
    assert reports[0].needed - reports[1].needed == 2 * matrices * reports[0].tokens
    assert reports[0].executed == pytest.approx(reports[0].needed * 4 / 3)


def test_eight_billion_parameters_take_no_memory():
    mesh = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
    exp = dataclasses.replace(dms.qwen3_8b(), mesh=mesh)
    before = len(jax.live_arrays())
    devices = make_mesh(mesh, jax.devices())
    with jax.set_mesh(devices):
        program = Program(exp, devices, _Tokenizer(exp.model.vocab_size))
    assert len(jax.live_arrays()) == before
    assert params_lib.count(program.spec) == 8_192_062_464
    whole = 4 * 8_192_062_464 / 2**30
    assert whole / 4 <= per_chip(program.state.params) < 1.001 * whole / 4
    assert per_chip(program.state.opt) < 0.001 * whole
    # By hand: the teacher's pass, the student's, and its gradients but those of the frozen matrices.
    layer, table = 2 * 4096 * 40 * 128 + 3 * 4096 * 12288, 4096 * 151936
    frozen = 36 * layer + table
    forward = 2 * (frozen + 36 * 4096 * 8) + 4 * 36 * 4096 * (32768 + 1) / 2
    needed, executed = operations(exp, program)
    assert needed / (8 * 32768) == pytest.approx(4 * forward - 2 * frozen, rel=1e-12)
    assert executed / (8 * 32768) == pytest.approx(5 * forward - 2 * frozen, rel=1e-12)


def test_a_mesh_that_does_not_fit_the_topology():
    with pytest.raises(AtomError, match="does not fit 8 devices"):
        check(make("mesh.fsdp=3"), "cpu:8")


def test_units_take_no_context_axis():
    exp = config.override(config.load_file("configs/units.py:tiny"), ["mesh.data=1", "mesh.context=8"])
    with pytest.raises(AtomError, match=r"mesh\.context"):
        check(exp, "cpu:8")


def test_the_real_compiler():
    pytest.importorskip("libtpu")
    exp = make("mesh.fsdp=4")
    report = check(exp, "v5e:2x2")
    assert report.fits and report.free > 0.9 and report.step.traffic.total > 0
