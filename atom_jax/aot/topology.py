"""Chips that a program can be compiled for, present or not, and what it needs there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from atom_jax.aot import hlo
from atom_jax.typing import AtomError

GIB = 2**30
# What the TPU compiler says of a program for its size: all that it needs, or the temporaries alone.
TOO_LARGE = re.compile(r"Used ([\d.]+[GM]) of [\d.]+[GM] hbm|for HLO temporaries \(([\d.]+[GM])\) exceeds")


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory: GiB of a chip's main memory. rate: peak bfloat16 operations per second of a chip."""

    memory: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a program needs per chip, in GiB, by its compiler.

    arguments: what it is given. new: results that do not take the place of an argument. temporary: working space,
    None where the compiler refused the program for its size. total: all of it at once. traffic: None where refused.
    places: shardings of the results.
    """

    arguments: float
    new: float
    temporary: float | None
    total: float
    traffic: hlo.Traffic | None
    places: Any = None

    def verdict(self, chip: Chip | None) -> str:
        """The total, and whether a chip has so much."""
        known = "" if chip is None else f" of {chip.memory:g}: does not fit"
        if self.fits(chip) and chip is not None:
            known = f" of {chip.memory:g}: fits, {1 - self.total / chip.memory:.0%} free"
        return f"{self.total:9.3f} GiB per chip{known}"

    def fits(self, chip: Chip | None) -> bool:
        """Whether it runs on such chips, as far as is known."""
        return self.temporary is not None and (chip is None or self.total <= chip.memory)


CHIPS = {"v5e": Chip(16, 197e12), "v5p": Chip(95, 459e12), "v6e": Chip(32, 918e12)}


def devices(topology: str | None) -> tuple[list[Any], Chip | None]:
    """The devices of a topology, and what is known of them.

    topology: for example "v5p:4x4x4", for which libtpu has to be installed; "cpu:8", simulated; None: those that are
    here. Raises AtomError when there is no such topology and when libtpu is missing.
    """
    if topology is None:
        return jax.devices(), None
    name, _, sizes = topology.partition(":")
    if name == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", sizes):
        return _simulated(int(sizes), topology), None
    if name not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", sizes):
        raise AtomError(
            f"--topology={topology}: expected the kind of chip ({', '.join(CHIPS)}) and how many lie side by side, "
            "such as v5e:4x4 or v5p:4x4x4; or cpu:8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise AtomError(f"--topology={topology} needs the TPU compiler, though no TPU: pip install 'atom-jax[tpu]'")
    # Without these libtpu asks the cloud's metadata server which machine it is on.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # its errors have no common base
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise AtomError(f"--topology={topology}: {reason}") from None
    return list(found), CHIPS[name]


def _simulated(n: int, topology: str) -> list[Any]:
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # of devices that are there already, as many as somebody asked for
        jax.config.update("jax_num_cpu_devices", n)
    found = jax.devices("cpu")
    if len(found) < n:
        raise AtomError(f"--topology={topology}: there are {len(found)} simulated devices")
    return found[:n]


def compiled(lowered: Any, topology: str | None) -> Compiled:
    """Compiles what `jax.jit(...).lower(...)` returned. Raises AtomError when that fails for other reasons than the
    program's size."""
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        used = TOO_LARGE.search(str(e))
        if not used:
            words = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise AtomError(f"the program does not compile for {topology or 'these devices'}: {words}") from None
        size = next(x for x in used.groups() if x is not None)
        return Compiled(0.0, 0.0, None, float(size[:-1]) / (1 if size[-1] == "G" else 1024), None)
    memory = done.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    new = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB
    total = arguments + temporary + new
    return Compiled(arguments, new, temporary, total, hlo.traffic(done.as_text()), done.output_shardings)


def per_chip(tree: Any) -> float:
    """GiB of a tree of ShapeDtypeStructs on every device of their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / GIB
