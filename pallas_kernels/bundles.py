"""What the TPU compiler made of a kernel, from the listings that it writes on request.

A listing holds one VLIW bundle per line, with a ">" for every loop around it; a second file says how many slots of
each functional unit a bundle occupies.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

# With these arguments libtpu writes its listings.
ARGUMENTS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
LISTING, SLOTS = "-final_bundles.txt", "-final_hlo-static-per-bundle-utilization.txt"
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:((?:\s*>)*)\s*\{", re.MULTILINE)
KERNEL = re.compile(r"entry bundle: %(\S+) = .*custom-call")


class Loop(NamedTuple):
    """Bundles at one depth of loops, and the share of their matrix-unit slots that is used."""

    bundles: int
    matrix: float


class Kernel(NamedTuple):
    """A compiled kernel: its name, its loops from the grid inwards, and the spills and fills of all of it."""

    name: str
    loops: list[Loop]
    spills: int


def kernels(folder: pathlib.Path) -> list[Kernel]:
    """Every Pallas kernel whose listing is in `folder`, in the order of compilation."""
    found = []
    for path in sorted(folder.glob(f"*{LISTING}")):
        text = path.read_text(errors="replace") if "schedule-analysis" not in path.name else ""
        entry = KERNEL.search(text)
        slots = sorted(folder.glob(re.sub(r"-\d+$", "-*", path.name.removesuffix(LISTING)) + SLOTS))
        if entry and slots:
            found.append(_kernel(re.sub(r"\.\d+$", "", entry[1]), text, slots[0].read_text()))
    return found


def _kernel(name: str, text: str, slots: str) -> Kernel:
    lines = [line.split() for line in slots.splitlines()]
    units = [unit.strip() for unit in slots.splitlines()[1].split(",")]
    used = [dict(zip(units, map(int, row))) for row in lines[4:] if len(row) == len(units)]
    capacity = dict(zip(units, map(int, lines[2])))
    depths = [marks.count(">") for marks in BUNDLE.findall(text)]
    if len(depths) != len(used):
        raise ValueError(f"{name}: the listing has {len(depths)} bundles, the table of slots {len(used)}")
    loops = []
    for level in range(1, max(depths) + 1):
        rows = [row for depth, row in zip(depths, used) if depth == level]
        loops.append(Loop(len(rows), sum(row["MXU"] for row in rows) / (max(len(rows), 1) * capacity["MXU"])))
    return Kernel(name, loops, sum(row["VLOAD:FILL"] + row["VSTORE:SPILL"] for row in used))
