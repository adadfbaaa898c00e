"""One mesh (data, fsdp, context, tensor), and rules from logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.typing import AtomError
from pallas_kernels.dispatch import choose

AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    # Positions of a row; and those of the residual stream between layers, of which every device keeps its share only.
    "length": ("context",),
    "stored_length": ("context", "tensor"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes the devices that are left.

    data: rows of the batch. fsdp: rows of the batch, and parameters with their moments. tensor: heads, MLP,
    vocabulary. context: positions of a row, for long rows (transformers only).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        config.check(self)


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given). Raises AtomError when the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.context, cfg.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise AtomError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} context={cfg.context} tensor={cfg.tensor} does not fit "
            f"{len(devices)} devices"
        )
    # Any sizes, also such as divide an axis of the torus on which the devices lie.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Any) -> P:
    """PartitionSpec of an array with named axes. A mesh axis that does not divide the dimension is dropped, and
    no mesh axis is used twice (the first dimension that asks for it has it)."""
    used: set[str] = set()
    entries = []
    for size, name in zip(shape, axes):
        chosen: list[str] = []
        for mesh_axis in RULES.get(name, ()):
            extent = mesh.shape[mesh_axis]
            if mesh_axis not in used and extent > 1 and size % (extent * _extent(mesh, chosen)) == 0:
                chosen.append(mesh_axis)
        used.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else (chosen[0] if chosen else None))
    return P(*entries)


def shardings(spec: Any, mesh: Mesh) -> Any:
    """The tree of NamedSharding that places a tree of ParamSpec on `mesh`."""
    return params_lib.map_specs(lambda s: NamedSharding(mesh, partition(s.shape, s.axes, mesh)), spec)


def filled(paths: Iterable[str], given: dict[str, Any]) -> Any:
    """A tree of the shardings that are given by path; what is left out there lies whole on every device of
    their mesh."""
    spread = next(iter(given.values()))
    if isinstance(spread, NamedSharding):
        spread = NamedSharding(spread.mesh, P())
    return params_lib.unflatten({path: given.get(path, spread) for path in paths})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes, everything else whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def row_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """(which, of how many): the part of a batch's rows that a process has to supply. Processes whose devices share
    rows, because a row's heads or positions are spread over them, supply the same part.

    Raises AtomError where processes have some rows in common and others not.
    """
    held: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(place[0] * mesh.shape["fsdp"] + place[1])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != mesh.shape["data"] * mesh.shape["fsdp"] or len({len(rows) for rows in parts}) > 1:
        sizes = " ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise AtomError(f"mesh {sizes}: rows cannot be divided among {len(held)} processes; change the sizes")
    return parts.index(tuple(sorted(held[process]))), len(parts)


def batch_shards(rows: int) -> int:
    """Number of devices among which `rows` rows of a batch are spread; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    shards = math.prod(mesh.shape[a] for a in RULES["batch"])
    return shards if rows % shards == 0 else 1


def tensor_shards() -> int:
    """Devices along the mesh axis "tensor"; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def length_shards(length: int) -> int:
    """Number of devices among which `length` positions of a row are spread; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["context"]
    return shards if length % shards == 0 else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axes; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, mesh))


def share(x_btd: jax.Array) -> jax.Array:
    """Sums of parts [b, t, d] that devices of the axis "tensor" hold, of which every device keeps some positions."""
    return constrain(constrain(x_btd, "batch", "length", None), "batch", "stored_length", None)


def alone() -> bool:
    """Whether a program is for one device, so that kernels need not be told how arrays are laid out."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def split(f: Callable[..., Any], axes_in: tuple, axes_out: tuple, *args: jax.Array) -> Any:
    """f(*args), where every device applies f to its own part if f has kernels, which the compiler cannot split.

    axes_in: logical axes of every argument, in front of those that are not split. axes_out: the same of the result,
    or, for a tuple of results, a tuple of them. f must treat entries along these axes on their own.
    """
    if alone() or choose(None) == "reference":
        return f(*args)
    mesh = jax.sharding.get_abstract_mesh()
    shapes = jax.eval_shape(f, *args)
    many = isinstance(shapes, tuple)
    out = tuple(partition(x.shape, a, mesh) for x, a in zip(shapes, axes_out)) if many else None
    out = out or partition(shapes.shape, axes_out, mesh)
    specs = tuple(partition(x.shape, a, mesh) for x, a in zip(args, axes_in))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)


def _extent(mesh: Any, axes: list[str]) -> int:
    return math.prod(mesh.shape[a] for a in axes)
