"""Compiles every operation at its named shapes for one kind of chip that need not be there.

    python -m pallas_kernels.compile_target v5e [--forward] [operation ...]

Prints one line of JSON per shape. The compilers are the real ones (libtpu; XLA:GPU with the CUDA plugin): what does
not fit a chip's memories or uses what it does not have fails here as it would there. Nothing runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from typing import Any

from pallas_kernels import bundles

# Names of the smallest topologies that the compiler accepts.
TPU = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = (*TPU, "h100")
H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 clock_rate_ghz: 1.98 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 device_memory_size: 84929347584 memory_bandwidth: 3352320000000
}"""


def missing(target: str) -> str | None:
    """The package without which nothing can be compiled for `target`, or None."""
    package = "libtpu" if target in TPU else "jax_cuda12_plugin"
    return None if importlib.util.find_spec(package) else package


def prepare(target: str, dump: str) -> None:
    """Sets what the compilers read from the environment; before jax is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    if target in TPU:
        # Without these libtpu looks for the machine's own chips.
        os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": bundles.ARGUMENTS.format(dump)}


def topology(target: str) -> Any:
    """Describes the chips of `target` to jax."""
    import jax
    from jax.experimental import topologies

    jax.devices()  # Finds the plugins.
    if target in TPU:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPU[target])
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100)


def compile_one(function: Any, shapes: list[Any], chips: Any) -> dict[str, Any]:
    """What the compiler says of one function: "error", or sizes in bytes and XLA's estimate of cycles."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    chip = chips.devices[0]
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=SingleDeviceSharding(chip)) for s in shapes]
    context: Any = contextlib.nullcontext()
    if chip.platform == "tpu":
        # Kernels ask for the kind of chip while they are lowered.
        device = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
        mesh = AbstractMesh((1,), ("chip",), axis_types=(AxisType.Auto,), abstract_device=device)
        context = jax.sharding.use_abstract_mesh(mesh)
    start = time.perf_counter()
    try:
        with context:
            compiled = jax.jit(function).lower(*placed).compile()
    except Exception as error:  # The compilers raise many kinds; their words are the result.
        return {"error": f"{type(error).__name__}: {error}"}
    memory = compiled.memory_analysis()
    cycles = [int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', compiled.as_text())]
    return {
        "seconds": time.perf_counter() - start,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        # The largest integer stands for an operation without an estimate.
        "cycles": sum(n for n in cycles if n < 2**63 - 1),
    }


def main(target: str, *only: str) -> None:
    """Prints {"shape": ..., "of": number of shapes, ...} for every shape of `target`, or of the operations named;
    with "--forward" without those that have a gradient."""
    forward, only = "--forward" in only, [name for name in only if name != "--forward"]
    dump = pathlib.Path(tempfile.mkdtemp())
    prepare(target, str(dump))
    from pallas_kernels import aot

    specs = aot.tpu() if target in TPU else aot.cuda()
    specs = {name: spec for name, spec in specs.items() if not only or name.split("/")[0] in only}
    specs = {name: spec for name, spec in specs.items() if not (forward and name.endswith("_grad"))}
    chips = topology(target)
    for name, (function, shapes) in specs.items():
        found = compile_one(function, shapes, chips)
        kernels = [] if "error" in found else bundles.kernels(dump)
        for path in dump.iterdir():
            path.unlink()
        found |= {"kernels": kernels, "spills": sum(kernel.spills for kernel in kernels)}
        print(json.dumps({"shape": name, "of": len(specs), **found}), flush=True)
    shutil.rmtree(dump)


if __name__ == "__main__":
    main(*sys.argv[1:])
