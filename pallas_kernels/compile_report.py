"""Compiles every operation for chips that need not be there, and prints one table.

    python -m pallas_kernels.compile_report [--targets=v5e,h100] [--only=ssd_chunk,...] [--forward] [--markdown=FILE]

Exits with 1 when anything is refused. A target whose compiler is not installed is left out with a line that says so.
On TPU the kernels are compiled, on an H100 the references and attention's kernels.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pallas_kernels.compile_target import TARGETS, missing

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEADER = (
    "target",
    "operation",
    "compiler",
    "arguments",
    "temporary",
    "XLA's cycles",
    "bundles by loop (MXU)",
    "spills",
)


def compile_all(target: str, only: list[str]) -> Iterator[dict[str, Any]]:
    """The records of `compile_target`, with one of a failure where its process dies. One process per target, because
    a compiler can be set up only once."""
    command = [sys.executable, "-m", "pallas_kernels.compile_target", target, *only]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The log is read at the end only: it is a few lines.
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    log = process.stderr.read().strip()
    if process.wait():
        words = (log.splitlines() or [""])[-1]
        yield {"shape": "(the compiler's process)", "of": 1, "error": f"exit code {process.returncode}: {words}"}


def cells(target: str, record: dict[str, Any]) -> tuple[str, ...]:
    """A record as a line of the table."""
    if "error" in record:
        return target, record["shape"], "REFUSED", "", "", "", "", ""
    loops = [" / ".join(f"{n} ({matrix:.0%})" for n, matrix in kernel[1]) for kernel in record["kernels"]]
    return (
        target, record["shape"], "accepted", f"{record['arguments'] / 2**20:.1f} MiB",
        f"{record['temporary'] / 2**20:.1f} MiB", f"{record['cycles']:,}" if record["cycles"] else "-",
        "; ".join(loops) or "-", str(record["spills"]) if loops else "-",
    )  # fmt: skip


def table(lines: list[tuple[str, ...]]) -> str:
    """Markdown that is legible in a terminal too."""
    lines = [HEADER, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def write(path: pathlib.Path, text: str) -> None:
    """Puts the table between the marks in a document. Raises ValueError where it has none."""
    document = path.read_text()
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"{path}: expected one line {BEGIN} and one line {END}")
    before, rest = document.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """Exit code 1 when something is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="operations, separated by commas")
    parser.add_argument("--forward", action="store_true", help="leave out the gradients, which take most of the time")
    parser.add_argument("--markdown", type=pathlib.Path, help="a document whose table is replaced")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"--targets: unknown {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    wanted = ["--forward"] * args.forward + [name for name in args.only.split(",") if name]
    lines, refused = [], []
    for target in targets:
        if package := missing(target):
            print(f"{target}: left out, because {package} is not installed", flush=True)
            continue
        for n, record in enumerate(compile_all(target, wanted), 1):
            lines.append(cells(target, record))
            if "error" in record:
                refused.append(f"{target} {record['shape']}: {' '.join(record['error'].split())[:600]}")
            verdict = "REFUSED" if "error" in record else f"{record['seconds']:.1f} s"
            print(f"[{target} {n}/{record['of']}] {record['shape']}: {verdict}", file=sys.stderr, flush=True)
    if lines:
        print(table(lines), *refused, f"{len(lines) - len(refused)} of {len(lines)} accepted", sep="\n")
    if lines and args.markdown:
        write(args.markdown, table(lines))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
