"""What programs need on the chips of a topology: how they are gathered, and how it is said."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from atom_jax import sharding
from atom_jax.aot.topology import Chip, Compiled, compiled, devices
from atom_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Report:
    """What programs need, by their names. count: parameters of the model. parameters: GiB per chip of them, which all
    programs read."""

    title: str
    chip: Chip | None
    count: int
    parameters: float
    programs: dict[str, Compiled]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether all programs run on these chips, as far as is known."""
        return all(one.fits(self.chip) for one in self.programs.values())

    def sizes(self) -> list[str]:
        """Lines about what each program needs and sends."""
        lines = []
        for name, one in self.programs.items():
            parts = ""
            if one.temporary is not None:
                other = max(one.arguments - self.parameters, 0.0) + one.new
                parts = f" (caches and other {other:.3f}, temporaries {one.temporary:.3f})"
            lines += [f"{name:<17}{one.verdict(self.chip)}{parts}"]
            if one.traffic is not None and one.traffic.total:
                lines += [f"{'  sent':<17}{one.traffic}"]
        return lines

    def advice(self) -> str:
        """What to change where it does not fit."""
        half = self.parameters > self.chip.memory / 2
        return "parameters take most of it: more chips on mesh.tensor" if half else "fewer or shorter rows"

    def __str__(self) -> str:
        lines = [self.title, f"{'parameters':<17}{self.parameters:9.3f} GiB per chip", *self.sizes()]
        if not self.fits:
            lines += [f"{'to do':<17}{self.advice()}"]
        return "\n".join([*lines, f"compiled in {self.seconds:.0f} s"])


class Chips:
    """The chips of a topology, and what programs need there.

    mesh: how they are used; None: only one of them is. Raises AtomError when there is no such topology, and for a
    mesh that does not fit it.
    """

    def __init__(self, topology: str | None, mesh: MeshConfig | None):
        self.topology, self.began = topology, time.monotonic()
        found, self.chip = devices(topology)
        self.mesh: Mesh = sharding.make_mesh(mesh or MeshConfig(), found if mesh else found[:1])
        self.programs: dict[str, Compiled] = {}

    def compile(self, name: str, lowered: Any) -> Compiled:
        """Compiles what `jax.jit(...).lower(...)` returned."""
        self.programs[name] = compiled(lowered, self.topology)
        return self.programs[name]

    def report(self, count: int, parameters: float, what: str, kind: type[Report] = Report, **more: Any) -> Any:
        """All programs so far, as a `kind`. what: they compute. more: fields that `kind` adds."""
        sizes = ", ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
        where = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        title = f"{count:,} parameters on {where} ({sizes}), {what}"
        return kind(title, self.chip, count, parameters, self.programs, time.monotonic() - self.began, **more)
