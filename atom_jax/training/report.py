"""What a step needs on devices that are present, or on a TPU pod that nobody has rented yet."""

from __future__ import annotations

import os

import jax

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.training import start
from atom_jax.training.config import Experiment
from atom_jax.training.program import Program
from atom_jax.typing import AtomError

GIB = 2**30


def compile_only(exp: Experiment, topology: str | None) -> str:
    """Compiles the step and returns a report: memory per device in GiB, and flops. Nothing is executed.

    topology: for example "v5p:4x4x4" (needs libtpu), or None for the devices that are here.
    Raises AtomError when the topology is unknown or the step doesn't compile for it.
    """
    mesh = sharding.make_mesh(exp.mesh, _devices(topology))
    with jax.set_mesh(mesh):
        program = Program(exp, mesh, start.tokenizer(exp))
        lowered = program.step.lower(program.state, program.abstract_batch())
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            raise AtomError(f"the step does not compile for {topology or 'these devices'}: {e}") from None
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    # The new state takes the place of the old one.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    total -= memory.alias_size_in_bytes
    sizes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return "\n".join([
        f"{params_lib.count(program.spec):,} parameters on {mesh.size} x {kind} ({sizes})",
        f"arguments {memory.argument_size_in_bytes / GIB:.3f} GiB per device",
        f"temporary {memory.temp_size_in_bytes / GIB:.3f} GiB per device",
        f"output    {memory.output_size_in_bytes / GIB:.3f} GiB per device"
        f" ({memory.alias_size_in_bytes / GIB:.3f} GiB of it in place of arguments)",
        f"total     {total / GIB:.3f} GiB per device",
        f"flops     {cost.get('flops', 0.0):.4g} per device and step, the body of a loop counted once",
    ])  # fmt: skip


def _devices(topology: str | None) -> list | None:
    if topology is None:
        return None
    from jax.experimental import topologies

    # Without these libtpu asks the cloud's metadata server which machine it is on.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:  # its errors have no common base: a missing plugin, an unknown name
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise AtomError(f"--topology={topology}: {reason} (is jax[tpu] installed?)") from None
