"""Rows of a new vocabulary, ours and mergekit's: the same tables, equal values, and the ratio of times, in one run.

    make smollm2 install-mergekit
    python -m benchmarks.transplant --tokenizer=Qwen/Qwen3-0.6B [--donor=PATH] [--fvt=20000] [--omp=1024] [--out=FILE]

fvt  means of pieces. mergekit looks tokens up as text: it takes one mark of a space away and leaves other letters of
     the byte alphabet as they are spelled ("CafÃ©"), and the tokenizer's splitting rule cuts the text first. Rows
     that it makes of other pieces are counted by these two reasons; all others are to be equal.
omp  orthogonal matching pursuit of the same vectors, k picks each. With float32 sums in another order, two points
     that fit nearly as well may be picked in either order; rows that are a thousandth apart are counted.

Without a donor its vectors are drawn: such rows mean nothing, but both sides make the same of them. Sides run in
turns, each in its own process; the first turn (compilation) doesn't count. Exit code 1 where rows of the same pieces
differ. tokenkit's FVT is in no package ("tokenkit" is another one); tests/golden/transfer holds what it made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from typing import Any

from absl import flags

import atom_jax
from atom_jax.files import write_text
from atom_jax.inference.transplant import donor_table, find_tokenizer
from atom_jax.typing import AtomError
from benchmarks import command, machine
from benchmarks.transplant_rows import HEADING, Plan, compare
from benchmarks.worker import Worker

PEER = "benchmarks.surgeon"
CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "A transformer over subwords.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "The other tokenizer: a path or a model id.")
DONOR = flags.DEFINE_string("donor", None, "A model that has it; by default its vectors are drawn.")
MERGEKIT = flags.DEFINE_string("mergekit", ".venv-mergekit/bin/python", "Python of the environment with mergekit.")
FVT_ROWS = flags.DEFINE_integer("fvt", 20_000, "Rows made by FVT; 0: none.", lower_bound=0)
OMP_ROWS = flags.DEFINE_integer("omp", 1024, "Rows made by OMP; 0: none.", lower_bound=0)
K = flags.DEFINE_integer("k", 64, "Picks of OMP.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns that count.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")


def _measure() -> bool:
    if not TOKENIZER.value:
        raise AtomError("--tokenizer is missing: a path or a model id")
    lm, tokenizer = atom_jax.load(CHECKPOINT.value, dtype="float32"), find_tokenizer(TOKENIZER.value)
    donor = donor_table(DONOR.value, tokenizer)[:, 0] if DONOR.value else None
    plan, rows = Plan(FVT_ROWS.value, OMP_ROWS.value, K.value, REPEATS.value), []
    found: dict[str, Any] = {"machine": machine.describe(), "plan": dataclasses.asdict(plan)}
    with contextlib.ExitStack() as opened:
        peer = None
        if pathlib.Path(MERGEKIT.value).exists():
            peer = opened.enter_context(Worker(PEER, MERGEKIT.value))
            found["versions"] = peer("about")
            print("; ".join(f"{k} {v}" for k, v in found["versions"].items()))
        else:
            print(f"--mergekit={MERGEKIT.value} is not there (`make install-mergekit`): only our side is measured")
        home = pathlib.Path(opened.enter_context(tempfile.TemporaryDirectory()))
        print(HEADING)
        for row in compare(lm, tokenizer, donor, plan, home, peer):
            rows.append(row)
            print(row, flush=True)
    if OUT.value:
        write_text(OUT.value, json.dumps({**found, "rows": [dataclasses.asdict(r) for r in rows]}, indent=1))
    return not any(row.apart for row in rows if row.method == "fvt")


def main() -> int:
    """Prints a line per method; exit code 1 where both sides differ."""
    return 0 if _measure() else 1


if __name__ == "__main__":
    command.run("transplant", main)
