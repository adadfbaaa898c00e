"""Rows of a new vocabulary as we make them and as mergekit does: the comparison of `benchmarks.transplant`."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.transfer.initialisers import FVT, Aux, Task
from atom_jax.transfer.initialisers.fvt import decompose
from atom_jax.transfer.initialisers.omp import OMP
from atom_jax.transfer.transplant import shared_rows, stacked
from atom_jax.typing import LM, AtomError

# Largest difference of a row, in units of the largest value of the table, that the order of float32 sums explains;
# and of a combination of many rows.
CLOSE, CLOSE_OMP = 1e-6, 1e-3
# Calls one of the peer's methods: name, arguments.
Peer = Callable[..., Any]


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
    process. Raises AtomError where either vocabulary is not that of a tokenizer.json, and where no token is new.
    """
    for one in (lm.tokenizer, tokenizer):
        if getattr(one, "backend", None) is None:
            raise AtomError(f"{getattr(one, 'name', 'the model')}: has no tokenizer.json, which mergekit needs")
    source, target, table = byte_view(lm.tokenizer), byte_view(tokenizer), stacked(lm)[:, :1]
    shared, rng = shared_rows(source, target, len(table)), np.random.default_rng(0)
    new = rng.permutation(np.setdiff1d(np.array(sorted(target.pieces)), shared[:, 0]))
    if not len(new):
        raise AtomError(f"{tokenizer.name}: the model has a row for each of its tokens already")
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
