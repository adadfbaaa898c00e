"""The rows of the table: what each one measures on both sides."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import machine
from benchmarks.compare import OURS, PEER, Bench, Figures, Plan, close, rates
from benchmarks.worker import Worker

# Steps over which the losses of both sides must agree.
CHECKED_STEPS = 4
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. needs_model: it reads the checkpoint. less: smaller values are better."""

    name: str
    label: str
    unit: str
    measure: Callable[[Bench], Figures]
    needs_model: bool = False
    less: bool = False


def rows(plan: Plan) -> list[Row]:
    """All rows of a plan; those of the machine come first, since the others are put in relation to them."""
    out = [
        Row("matmul", f"machine: product of {plan.matmul}² matrices", "GFLOP/s", _matmul),
        Row("read", f"machine: read {plan.megabytes} MiB", "GB/s", lambda b: _traffic(b, "read", 1)),
        Row("copy", f"machine: copy {plan.megabytes} MiB (read + write)", "GB/s", lambda b: _traffic(b, "copy", 2)),
    ]
    first, longest = plan.prompts[0], max(plan.prompts)
    for length in plan.prompts:
        measure = lambda b, n=length: _prefill(b, n)  # noqa: E731
        out.append(Row(f"prefill-{length}", f"prefill, {length:,} tokens", "tokens/s", measure, needs_model=True))
    for count, length in [(1, n) for n in plan.prompts] + [(plan.batch, first)]:
        name = f"decode-{length}" + (f"x{count}" if count > 1 else "")
        label = f"decode after {length:,} tokens" + (f", batch {count}" if count > 1 else "")
        measure = lambda b, c=count, n=length: _decode(b, c, n)  # noqa: E731
        out.append(Row(name, label, "tokens/s", measure, needs_model=True))
    short = [os.path.basename(r).partition(":")[2] or os.path.basename(r) for r in plan.train]
    for variant, reference in zip(short, plan.train):
        measure = lambda b, r=reference: _train(b, r)  # noqa: E731
        out.append(Row(f"train-{variant}", f"training, {variant}", "tokens/s", measure))
    what = f"memory: {longest:,} tokens + {plan.new_tokens} new"
    out.append(Row("memory-decode", what, "GiB peak", lambda b: _memory(b, longest), needs_model=True, less=True))
    for variant, reference in zip(short, plan.train):
        measure = lambda b, r=reference: _train_memory(b, r)  # noqa: E731
        out.append(Row(f"memory-train-{variant}", f"memory: training, {variant}", "GiB peak", measure, less=True))
    return out


def _matmul(bench: Bench) -> Figures:
    n = bench.plan.matmul
    setting = bench.fastest(bench.peer, "machine", lambda: bench.peer("matmul", n))
    seconds = bench.turns(lambda: bench.ours("matmul", n), lambda: bench.peer("matmul", n))
    return Figures(*rates(2 * n**3 / 1e9, seconds), setting)


def _traffic(bench: Bench, what: str, passes: int) -> Figures:
    nbytes = bench.plan.megabytes * 2**20
    setting = bench.fastest(bench.peer, "machine", lambda: bench.peer(what, nbytes))
    seconds = bench.turns(lambda: bench.ours(what, nbytes), lambda: bench.peer(what, nbytes))
    return Figures(*rates(passes * nbytes / 1e9, seconds), setting)


def _prefill(bench: Bench, length: int) -> Figures:
    cfg, prompts = bench.open(), bench.prompts(1, length)
    ours, peer = ((lambda w=w: w("prefill", prompts)) for w in (bench.ours, bench.peer))
    setting = bench.fastest(bench.peer, "prefill", lambda: peer()["seconds"])
    # Our first call compiles.
    bench.say("checking")
    bench.same_tokens(prompts, ours()["ids"], peer()["ids"])
    seconds = bench.turns(lambda: ours()["seconds"], lambda: peer()["seconds"])
    gflop = machine.forward_flops(cfg, 1, length, 1) / length / 1e9
    return Figures(*rates(length, seconds), setting, "matmul", gflop)


def _decode(bench: Bench, count: int, length: int) -> Figures:
    cfg, prompts, new = bench.open(), bench.prompts(count, length), bench.plan.new_tokens
    ours, peer = ((lambda w=w: w("decode", prompts, new)) for w in (bench.ours, bench.peer))
    setting = bench.fastest(bench.peer, "decode", lambda: peer()["seconds"])
    bench.say("checking")
    bench.same_tokens(prompts, ours()["ids"], peer()["ids"])
    seconds = bench.turns(lambda: ours()["seconds"], lambda: peer()["seconds"])
    gigabytes = machine.decode_bytes(cfg, count, length + new / 2) / count / 1e9
    return Figures(*rates(count * new, seconds), setting, "read", gigabytes)


def _train(bench: Bench, reference: str) -> Figures:
    steps = bench.plan.train_steps
    with _training(bench, reference) as (ours, peer, run):
        setting = bench.fastest(peer, "train", lambda: peer("train", 1)["seconds"])
        seconds = bench.turns(lambda: ours("train", steps)["seconds"], lambda: peer("train", steps)["seconds"])
    tokens = run["rows"] * run["length"]
    gflop = machine.train_flops(run["model"], run["rows"], run["length"]) / tokens / 1e9
    return Figures(*rates(steps * tokens, seconds), setting, "matmul", gflop)


def _train_memory(bench: Bench, reference: str) -> Figures:
    if reference not in bench.training_peaks:
        with _training(bench, reference):
            pass
    return Figures(*([peak / GIB] for peak in bench.training_peaks[reference]))


@contextlib.contextmanager
def _training(bench: Bench, reference: str) -> Iterator[tuple[Worker, Worker, dict[str, Any]]]:
    """Fresh processes that train the same model, after steps whose losses agreed; notes their peaks in `bench`."""
    with contextlib.ExitStack() as opened:
        directory = opened.enter_context(tempfile.TemporaryDirectory())
        ours, peer = (opened.enter_context(Worker(m)) for m in (OURS, PEER))
        bench.say("preparing")
        run = ours("start_training", reference, directory)
        peer("start_training", directory, run["optim"])
        losses = [side("train", CHECKED_STEPS)["losses"] for side in (ours, peer)]
        close(*losses, reference)
        bench.training_peaks[reference] = [side("peak") for side in (ours, peer)]
        yield ours, peer, run


def _memory(bench: Bench, length: int) -> Figures:
    cfg, prompts = bench.open(), bench.prompts(1, length)
    peaks = []
    for module in (OURS, PEER):
        bench.say("a fresh process")
        with Worker(module) as side:
            side("open", bench.plan.checkpoint)
            if module == PEER:
                side("use", side("settings", "decode")[0])
            side("decode", prompts, bench.plan.new_tokens)
            peaks.append([side("peak") / GIB])
    return Figures(*peaks, "", "weights", machine.weight_bytes(cfg) / GIB)
