"""The long forms of the tests of reliability: `make soak`, or one part of it, `make soak SOAK=kills`.

    python -m tests.reliability.soak [--parts=kills,mutants,bytes,memory,rows,ties,load] [--minutes=8] [--out=FILE]

What was done is a line of the file; the same command goes on with the rest, and tries what failed again. With a limit
of minutes nothing new is begun after them. Two items run at a time. docs/reliability.md has the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS, MUTANTS, BATCHES, BYTES, ROWS = 4, 20_000, 50, 100_000, 16
DIGITS = tuple(range(9, 24))
MODEL = ROOT / "models" / "smollm2-135m-instruct"
# What is compiled without optimisation, as in the tests, and what is compiled as users have it.
LEVELS = {"O0": quick.FLAGS, "default": ""}


@dataclasses.dataclass(frozen=True)
class Part:
    """items(): what is to be done. run(item) -> (how much was tried, descriptions of failures, measurements by name).
    unit: of what is tried. flags: XLA's, by item. alone: one item at a time."""

    items: Callable[[], list[str]]
    run: Callable[[str], tuple[int, list[str], dict[str, Any]]]
    unit: str
    flags: Callable[[str], str] = lambda item: LEVELS["O0"]
    alone: bool = False


def memory_kills(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """A process that reads sources into a memory on disk, one commit after another, and is killed some times,
    wherever it stands: each time the memory opens, is whole, and is what it is after some number of commits; the
    process after the last kill ends with what one that nobody killed has."""
    from tests.lasting import disk

    rng, failures = random.Random(item), []
    with tempfile.TemporaryDirectory() as home:
        whole, path = pathlib.Path(home) / "whole", pathlib.Path(home) / "m"
        states = [disk.content(disk.make(whole))]
        for source in range(disk.SOURCES):
            disk.add(whole, source, disk.TOKENS)
            states.append(disk.content(whole))
        disk.make(path)
        command = [sys.executable, "-m", "tests.lasting.disk", str(path)]
        for i in range(KILLS):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if disk.content(path) not in states:
                failures.append(f"{item}: after kill {i} the memory is none of those between commits")
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        if disk.content(path) != states[-1]:
            failures.append(f"{item}: in the end it is not what an undisturbed one is")
    return KILLS, failures, {}


@functools.cache
def undisturbed() -> tempfile.TemporaryDirectory:
    """A training run that nobody kills."""
    from tests.test_train_script import begin, end

    home = tempfile.TemporaryDirectory()
    end(begin(pathlib.Path(home.name)))
    return home


def kills(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """A training run that is killed some times, each time wherever it stands, and then left alone: the losses of all
    its steps and its parameters are those of a run that nobody killed."""
    import jax
    import numpy as np

    from atom_jax.checkpoint import store
    from atom_jax.training.record import read
    from tests.test_train_script import begin, end, losses, reach

    rng, whole = random.Random(item), pathlib.Path(undisturbed().name)
    with tempfile.TemporaryDirectory() as home:
        run = pathlib.Path(home)
        for i in range(KILLS):
            process = begin(run)
            at = max((line["step"] for line in read(run / "metrics.jsonl")), default=0)
            if i == KILLS - 1:
                time.sleep(rng.uniform(0, 12))  # perhaps before its first step
            else:
                reach(process, run, min(at + rng.randrange(1, 70), 239))
                time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        end(begin(run))
        if losses(run) != losses(whole):
            return KILLS, [f"{item}: other losses"], {}
        for a, b in zip(*(jax.tree.leaves(store.load_params(path)[1]) for path in (whole, run)), strict=True):
            if not np.array_equal(a, b):
                return KILLS, [f"{item}: other parameters"], {}
    return KILLS, [], {}


FUZZ = ("tests/reliability/test_fuzz.py", "tests/reliability/test_fuzz_later.py")


def _pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@functools.cache
def readers() -> list[str]:
    """The tests of FUZZ, each of one reader."""
    return re.findall(r"^(tests/\S+::\S+)$", _pytest("--collect-only", *FUZZ).stdout, re.MULTILINE)


def mutants(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """Damaged files of one reader: as many for each."""
    count = -(-MUTANTS // len(readers()))
    done = _pytest(item, ATOM_SOAK=str(count))
    return count, [f"{item}: {done.stdout[-600:]}"] if done.returncode else [], {}


def row_items() -> list[str]:
    """Families with policies, of each pair one example first."""
    from tests.reliability import rows

    seen: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for case in rows.cases():
        seen.setdefault((case[0], case[2]), []).append(case)
    first, rest = [], []
    for number, found in enumerate(seen.values()):
        chosen = number % len(found)
        first.append(found[chosen])
        rest += found[:chosen] + found[chosen + 1 :]
    return [f"{'/'.join(case)}/{level}" for part in (first, rest) for level in LEVELS for case in part]


def row_batches(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """Ragged batches of one model with one policy, over two turns: rows next to themselves alone."""
    from tests.reliability import rows

    lm = rows.model(*item.split("/")[:3])
    return BATCHES, [f"{item}: {said}" for seed in range(BATCHES) if (said := rows.difference(lm, seed))], {}


def byte_items() -> list[str]:
    """Models that read and write bytes."""
    from atom_jax.models import registry

    return [f"{family.name}/{example}" for family in registry.FAMILIES.values() for example in family.examples()]


def generated(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """Bytes that a batch of rows chooses greedily with its cache: each is the likeliest where the whole text is read
    at once, but for rounding."""
    import numpy as np

    import atom_jax
    from atom_jax.models import registry
    from tests.reliability import rows

    family, example = item.split("/")
    lm = rows.plain(family, example)
    new = -(-BYTES // (ROWS * len(byte_items())))
    prompts = [rows.texts(lm.config, seed)[0][seed % 3] for seed in range(ROWS)]
    made = atom_jax.generate(lm, prompts, new, stop_ids=())
    logits = rows.whole(lm, prompts, made.ids)
    logits[..., list(registry.of(lm.config).codec(lm.config).unused)] = -np.inf
    wrong = []
    for row, (prompt, found) in enumerate(zip(prompts, made.ids)):
        mine = logits[row, len(prompt) - 1 :][: len(found)]
        behind = mine.max(1) - mine[np.arange(len(found)), found]
        if len(found) != new or not behind.max() < 1e-3:
            wrong.append(f"{item}, row {row}: {len(found)} of {new} bytes, {behind.max():.1e} behind the likeliest")
    return ROWS * new, wrong, {}


def tie_items() -> list[str]:
    """Models with and without norms on keys, and policies whose scores are computed from activations."""
    models = ("qwen3/plain", "llama/plain", "olmo2/plain", "hnet/hnet")
    names = ("knorm", "tova", "h2o", "observed_attention", "snapkv", "expected_attention", "keydiff", "kvcompose")
    return [f"{model}/{name}/{level}" for level in LEVELS for model in models for name in names]


def ties(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """How many heads rank their entries otherwise in a batch than alone, by the binary digits that count."""
    from tests.reliability import rows

    lm = rows.model(*item.split("/")[:3], budget=400)
    found = [rows.flips(lm, seed, DIGITS) for seed in range(BATCHES // 4)]
    return sum(n for n, _ in found), [], {"digits": DIGITS, "others": sum(x for _, x in found).tolist()}


def load(item: str) -> tuple[int, list[str], dict[str, Any]]:
    """Seconds of loading SmolLM2 from files with checksums and without, in turns."""
    from safetensors.numpy import load_file, save_file

    import atom_jax
    from atom_jax.checkpoint.safetensors_io import SINGLE, SafetensorsSource

    with tempfile.TemporaryDirectory() as home:
        homes = {name: pathlib.Path(home) / name for name in ("without", "with")}
        for path in homes.values():
            shutil.copytree(MODEL, path, ignore=shutil.ignore_patterns(SINGLE))
        atom_jax.save_hf(atom_jax.load(MODEL), homes["with"])
        save_file(load_file(homes["with"] / SINGLE), homes["without"] / SINGLE, metadata={"format": "pt"})
        sources = {name: SafetensorsSource(path) for name, path in homes.items()}
        if sources["without"].crcs or set(sources["with"].crcs) != set(sources["with"].infos):
            return 0, [f"{MODEL}: expected files without checksums"], {}
        seconds: dict[str, list[float]] = {name: [] for name in homes}
        for turn in range(8):
            for name, path in homes.items():
                began = time.perf_counter()
                lm = atom_jax.load(path)
                if turn:  # the first fills caches
                    seconds[name].append(time.perf_counter() - began)
                del lm
    return 14, [], {"loads": seconds, **{f"median {k}": statistics.median(v) for k, v in seconds.items()}}


def _level(item: str) -> str:
    return LEVELS[item.rpartition("/")[2]]


PARTS = {
    "kills": Part(lambda: [f"run {i}" for i in range(100 // KILLS)], kills, "kill"),
    "mutants": Part(readers, mutants, "file"),
    "rows": Part(row_items, row_batches, "batch", _level),
    "bytes": Part(byte_items, generated, "byte"),
    "ties": Part(tie_items, ties, "rank", _level),
    "memory": Part(lambda: [f"memory {i}" for i in range(200 // KILLS)], memory_kills, "kill"),
    "load": Part(lambda: ["smollm2"] if MODEL.is_dir() else [], load, "load", lambda item: "", alone=True),
}


def _run(name: str, item: str) -> dict[str, Any]:
    """One line of the results."""
    began = time.perf_counter()
    try:
        count, failures, found = PARTS[name].run(item)
    except Exception as e:
        count, failures, found = 0, [f"{item}: {type(e).__name__}: {str(e)[-600:]}"], {}
    seconds = round(time.perf_counter() - began, 1)
    return {"part": name, "item": item, "count": count, "failures": failures, "seconds": seconds, **found}


def _initialize(flags: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def soak(name: str, out: pathlib.Path, deadline: float) -> bool:
    """Does what is left of a part; whether nothing failed."""
    part, done = PARTS[name], {line["item"]: line for line in results(out) if line["part"] == name}
    good = [item for item, line in done.items() if not line["failures"]]
    left = [item for item in part.items() if item not in good]
    bar = tqdm(desc=f"{name}, {len(left)} items left", unit=part.unit, initial=sum(done[i]["count"] for i in good))
    failed = 0
    with bar, out.open("a", encoding="utf-8") as file:
        groups = [(flags, list(items)) for flags, items in itertools.groupby(left, part.flags)]
        for flags, items in groups:
            for line in _each(name, items, flags, deadline):
                file.write(json.dumps(line) + "\n")
                file.flush()
                left.remove(line["item"])
                bar.set_description(f"{name}, {len(left)} items left", refresh=False)
                bar.update(line["count"])
                for text in line["failures"]:
                    bar.write(f"FAILED {text}")
                failed += len(line["failures"])
    return not failed


def _each(name: str, items: list[str], flags: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Results of the items of a part that are begun before the deadline, as they come."""
    several = 1 if PARTS[name].alone else 2
    # A process for a few items each: thousands of compiled programs would exhaust its memory maps.
    how = {"mp_context": get_context("spawn"), "initializer": _initialize, "initargs": (flags,)}
    with ProcessPoolExecutor(several, max_tasks_per_child=6, **how) as pool:
        waiting: Iterator[str] = iter(items)
        running: dict[Future, str] = {}
        broken = False
        while True:
            while (
                not broken
                and len(running) < several
                and time.monotonic() < deadline
                and (item := next(waiting, None))
            ):
                running[pool.submit(_run, name, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool as e:
                    broken = True
                    yield {"part": name, "item": item, "count": 0, "failures": [f"{item}: {e}"], "seconds": 0}


def results(out: pathlib.Path) -> list[dict[str, Any]]:
    """The latest line of every item; half a line, which a kill has left, is none."""
    text = out.read_text("utf-8").splitlines() if out.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("}")]
    return list({(line["part"], line["item"]): line for line in lines}.values())


def summary(out: pathlib.Path) -> str:
    """What was done so far, a line for each part."""
    text = []
    for name, part in PARTS.items():
        mine = [line for line in results(out) if line["part"] == name]
        if mine:
            count, failed = sum(line["count"] for line in mine), sum(len(line["failures"]) for line in mine)
            seconds = sum(line["seconds"] for line in mine)
            text.append(
                f"{name:<8} {len(mine):>5} items {count:>9,} {part.unit}s {failed:>4} failed {seconds:>8,.0f} s"
            )
    return "\n".join(text)


def main() -> int:
    """Runs the parts; 1 where something failed."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--parts", default="kills,mutants,bytes,memory,rows")
    flags.add_argument("--minutes", type=float, default=float("inf"))
    flags.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "soak.jsonl")
    given = flags.parse_args()
    names = given.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        flags.error(f"no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    good = [soak(name, given.out, deadline) for name in names]
    print(summary(given.out))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
