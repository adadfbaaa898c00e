"""Chips that a step can be compiled for, present or not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory: GiB of a chip's main memory. rate: peak bfloat16 operations per second of a chip."""

    memory: float
    rate: float


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
