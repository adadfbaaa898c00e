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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

import atom_jax
from atom_jax.inference.transplant import find_tokenizer
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.transfer.initialisers import FVT, Aux, Task
from atom_jax.transfer.initialisers.fvt import decompose
from atom_jax.transfer.initialisers.omp import OMP
from atom_jax.transfer.transplant import shared_rows, stacked
from atom_jax.typing import LM, AtomError
from benchmarks import machine
from benchmarks.worker import Refused, Worker

PEER = "benchmarks.surgeon"
# Largest difference of a row, in units of the largest value of the table, that the order of float32 sums explains;
# and of a combination of many rows.
CLOSE, CLOSE_OMP = 1e-6, 1e-3
# Calls one of the peer's methods: name, arguments.
Peer = Callable[..., Any]

CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "A transformer over subwords.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "The other tokenizer: a path or a model id.")
DONOR = flags.DEFINE_string("donor", None, "A model that has it; by default its vectors are drawn.")
MERGEKIT = flags.DEFINE_string("mergekit", ".venv-mergekit/bin/python", "Python of the environment with mergekit.")
FVT_ROWS = flags.DEFINE_integer("fvt", 20_000, "Rows made by FVT; 0: none.", lower_bound=0)
OMP_ROWS = flags.DEFINE_integer("omp", 1024, "Rows made by OMP; 0: none.", lower_bound=0)
K = flags.DEFINE_integer("k", 64, "Picks of OMP.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns that count.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: how many rows, seconds of both sides, turn by turn, the largest difference of rows that are to be
    equal in units of the largest value, how many of these are further apart than rounding explains, and how many are
    made of other pieces, by the reason."""

    method: str
    rows: int
    ours: list[float]
    peer: list[float]
    difference: float | None = None
    apart: int = 0
    others: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.method:<12}{self.rows:>8,}{statistics.median(self.ours):>10.3f}"
        if not self.peer:
            return text
        theirs = statistics.median(self.peer)
        others = ", ".join(f"{n:,} {reason}" for reason, n in self.others.items() if n)
        return (f"{text}{theirs:>10.3f}{theirs / statistics.median(self.ours):>8.2f}x{self.difference:>12.1e}"
                f"{self.apart:>8,}  {others}").rstrip()  # fmt: skip


HEADING = (
    f"{'method':<12}{'rows':>8}{'ours, s':>10}{'peer, s':>10}{'faster':>9}{'difference':>12}{'apart':>8}  others"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """fvt, omp: rows of either method. k: picks. repeats: turns that count."""

    fvt: int
    omp: int
    k: int
    repeats: int


def compare(lm: LM, tokenizer: Any, donor: np.ndarray | None, plan: Plan, home: pathlib.Path, peer: Peer | None
            ) -> Iterator[Row]:  # fmt: skip
    """A row per method, as they are measured.

    donor: f32 [ids, e], or None. home: a directory for what both sides read and write. peer: an open `Surgeon` in its
    process. Raises AtomError where either vocabulary is not that of a tokenizer.json.
    """
    for one in (lm.tokenizer, tokenizer):
        if getattr(one, "backend", None) is None:
            raise AtomError(f"{getattr(one, 'name', 'the model')}: has no tokenizer.json, which mergekit needs")
    source, target, table = byte_view(lm.tokenizer), byte_view(tokenizer), stacked(lm)[:, :1]
    shared, rng = shared_rows(source, target, len(table)), np.random.default_rng(0)
    new = rng.permutation(np.setdiff1d(np.array(sorted(target.pieces)), shared[:, 0]))
    donor = rng.standard_normal((target.size, table.shape[-1]), np.float32) if donor is None else donor
    tasks = [Task(source, target, table, np.sort(new[:n]), shared, Aux(donor[:, None])) for n in (plan.fvt, plan.omp)]
    if peer is not None:
        (home / "tokenizer.json").write_text(lm.tokenizer.backend.to_str(), "utf-8")
        tables = table[:, 0], donor[shared[:, 0]], table[shared[:, 1], 0], donor[tasks[1].new]
        for name, values in zip(("table", "points", "base", "targets"), tables):
            np.save(home / f"{name}.npy", np.ascontiguousarray(values, np.float32))
        peer("open", str(home))
    if plan.fvt:
        yield _fvt(tasks[0], tokenizer, plan, home, peer)
    if plan.omp:
        method = OMP(plan.k)
        ask = peer and (lambda: peer("omp", plan.k))
        ours, row = _turns(f"omp, k={plan.k}", lambda: method.rows(tasks[1])[0], ask, len(tasks[1].new), plan.repeats)
        yield row if peer is None else _judged(row, ours, np.load(home / "omp.npy"), CLOSE_OMP, table)


def _fvt(task: Task, tokenizer: Any, plan: Plan, home: pathlib.Path, peer: Peer | None) -> Row:
    spelled = [tokenizer.backend.id_to_token(i) for i in task.new.tolist()]
    prefix = "Ġ" if tokenizer.kind == "bytes" else "▁"
    ask = peer and (lambda: peer("fvt", spelled, prefix))
    ours, row = _turns("fvt", lambda: FVT().rows(task)[0], ask, len(task.new), plan.repeats)
    if peer is None:
        return row
    cuts = [cut.tolist() for cut in decompose(task.source, task.target, task.new, len(task.table))]
    same = np.array([a == b for a, b in zip(cuts, peer("cuts", spelled, prefix), strict=True)])
    # What mergekit makes of the spelling, where that is not what the token stands for.
    read = [token.replace(prefix, " ", 1) if token.startswith(prefix) else token for token in spelled]
    as_spelled = np.array([text.encode() != task.target.pieces[i] for text, i in zip(read, task.new.tolist())])
    others = {"read as they are spelled": ~same & as_spelled, "cut by the splitting rule": ~same & ~as_spelled}
    row = dataclasses.replace(row, others={reason: int(found.sum()) for reason, found in others.items()})
    return _judged(row, ours[same], np.load(home / "fvt.npy")[same], CLOSE, task.table)


def _turns(
    name: str, ours: Callable[[], np.ndarray], ask: Callable[[], float] | None, rows: int, repeats: int
) -> tuple[np.ndarray, Row]:
    """Rows [m, d] of our side, and the times of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        begin = time.perf_counter()
        made = ours()
        taken = time.perf_counter() - begin
        theirs = ask() if ask else None
        if turn:
            seconds[0].append(taken)
            seconds[1].extend([] if theirs is None else [theirs])
    return made[:, 0], Row(name, rows, *seconds)


def _judged(row: Row, ours: np.ndarray, theirs: np.ndarray, close: float, table: np.ndarray) -> Row:
    """With how far rows [m, d] of both sides are apart, in units of the table's largest value."""
    apart = np.abs(ours - theirs).max(axis=1, initial=0.0) / np.abs(table).max()
    return dataclasses.replace(row, difference=float(apart.max(initial=0.0)), apart=int((apart > close).sum()))


def _measure() -> bool:
    if not TOKENIZER.value:
        raise AtomError("--tokenizer is missing: a path or a model id")
    lm, tokenizer = atom_jax.load(CHECKPOINT.value, dtype="float32"), find_tokenizer(TOKENIZER.value)
    donor = stacked(atom_jax.load(DONOR.value))[:, 0] if DONOR.value else None
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
        pathlib.Path(OUT.value).write_text(
            json.dumps({**found, "rows": [dataclasses.asdict(r) for r in rows]}, indent=1)
        )
    return not any(row.apart for row in rows if row.method == "fvt")


def main(argv: list[str]) -> None:
    """Prints a line per method; exit code 1 for bad input, in one sentence, and where both sides differ."""
    try:
        if len(argv) > 1:
            raise AtomError(f"unexpected argument {argv[1]!r}")
        sys.exit(0 if _measure() else 1)
    except (AtomError, Refused, OSError) as e:
        print(f"benchmarks.transplant: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
