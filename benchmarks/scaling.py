"""Weak scaling before any chip is rented: what every chip holds, computes and sends as a pod grows.

    pip install 'atom-jax[tpu]'
    python -m benchmarks.scaling --config=configs/dms.py:qwen3_1b7 --rows=1      # docs/scaling.md has the tables

Every chip gets the same number of rows; parameters are spread over --fsdp chips. The step is compiled for
each topology as a run would compile it, and the compiled program is read: nothing is run, so there are no times.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from absl import app, flags

CONFIG = flags.DEFINE_string("config", "configs/dms.py:qwen3_1b7", "FILE.py:variant")
SET = flags.DEFINE_multi_string("set", [], "Changes a field of the configuration: NAME=VALUE. Repeatable.")
FSDP = flags.DEFINE_integer("fsdp", 16, "Chips at most that share parameters; others repeat them.")
ROWS = flags.DEFINE_integer("rows", 1, "Rows per chip and step.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"], "Smallest first.")

HEAD = (
    "| chips | topology | tokens per step | memory, GiB (free) | operations per chip | gather | scatter | reduce | "
)
HEAD += "other | sent, GiB | against the first |"
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def main(argv: Sequence[str]) -> None:
    """Prints the table, a row as soon as it is known."""
    from atom_jax.training import start
    from atom_jax.typing import AtomError

    try:
        exp = start.configure(CONFIG.value, SET.value)
        print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n", flush=True)
        first = None
        for topology in TOPOLOGIES.value:
            report = grown(exp, topology, ROWS.value, FSDP.value)
            first = first or report.step.traffic.total
            print(row(topology, report, first), flush=True)
    except AtomError as e:
        print(f"benchmarks.scaling: {e}", file=sys.stderr)
        sys.exit(1)


def grown(exp, topology: str, rows: int, fsdp: int):
    """The report (`StepReport`) of an experiment on all chips of a topology, with so many rows on each."""
    from atom_jax.aot.topology import devices
    from atom_jax.aot.training import check
    from atom_jax.sharding import MeshConfig
    from atom_jax.typing import AtomError

    chips = len(devices(topology)[0])
    data = dataclasses.replace(exp.data, batch_size=chips * rows)
    optim = dataclasses.replace(exp.optim, accumulate=1)
    exp = dataclasses.replace(exp, data=data, optim=optim, mesh=MeshConfig(data=-1, fsdp=min(fsdp, chips)))
    report = check(exp, topology)
    if report.step.traffic is None:
        raise AtomError(f"{topology}: the step needs {report.total:.1f} GiB per chip, {report.advice()}")
    return report


def row(topology: str, report, first: float) -> str:
    """A line of the table; first: bytes sent in the first line."""
    sent = {kind: report.step.traffic.bytes.get(kind, 0.0) / 2**30 for kind in KINDS}
    total = report.step.traffic.total / 2**30
    free = "" if report.free is None else f" ({report.free:.0%})"
    cells = [
        report.chips, topology, f"{report.tokens:,}", f"{report.total:.2f}{free}",
        f"{report.executed / report.chips:.3g}", *(f"{sent[kind]:.2f}" for kind in KINDS),
        f"{total - sum(sent.values()):.2f}", f"{total:.2f}", f"{report.step.traffic.total / max(first, 1.0):.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    app.run(main)
