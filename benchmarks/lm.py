"""Our speed and memory next to PyTorch's on this machine's CPU, measured in turns in one run, as one table.

    python -m benchmarks.lm [--checkpoint=DIR] [--rows=prefill-512,decode-*] [--repeats=5] [--out=FILE.json]

Each side has its own process; the other one sleeps while it runs. The peer is transformers in eager PyTorch, in the
fastest of its settings (attention, cache, optimiser, threads), which the table names. Before anything is timed, both
sides must agree: logits, greedy tokens, losses. Everything is float32, and compilation and first calls don't count.

prefill   reading one prompt into the cache and choosing one token.
decode    greedy tokens after a prompt; the prompt's time doesn't count.
training  steps of AdamW from the same random values on the same batches.
memory    the most that a fresh process held (resident), libraries and compiler included.
"bound" is the share of the machine's rate (matmul, read), the faster side's, that the row's arithmetic or reading
amounts to; for memory, the multiple of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import signal
import statistics
from typing import Any

from absl import flags
from tqdm import tqdm

from atom_jax.files import write_text
from atom_jax.typing import AtomError
from benchmarks import command, machine, table
from benchmarks.compare import Bench, Plan, need_torch
from benchmarks.rows import Row, rows
from benchmarks.worker import Refused

_DEFAULT = Plan()
CHECKPOINT = flags.DEFINE_string("checkpoint", _DEFAULT.checkpoint, "Hugging Face directory with safetensors.")
ROWS = flags.DEFINE_list("rows", ["*"], "Names of rows or patterns, see --list.")
LIST = flags.DEFINE_bool("list", False, "Print the names of the rows and stop.")
REPEATS = flags.DEFINE_integer("repeats", _DEFAULT.repeats, "Measurements of each side per row.", lower_bound=1)
PROMPTS = flags.DEFINE_list("prompts", [str(n) for n in _DEFAULT.prompts], "Lengths of prompts in tokens.")
NEW = flags.DEFINE_integer("new_tokens", _DEFAULT.new_tokens, "Tokens to decode.", lower_bound=1)
TRAIN = flags.DEFINE_list("train", list(_DEFAULT.train), "Configurations to train, FILE.py:variant.")
OUT = flags.DEFINE_string("out", None, "Also write the numbers of every repeat to this JSON file.")
# A machine that does other work is reported from this load per core on.
BUSY = 0.25


def run(plan: Plan, patterns: list[str], out: pathlib.Path | None = None) -> bool:
    """Measures and prints the rows that match; returns whether all were measured (False: interrupted).

    The rates of the machine are measured in any case. `out` receives what there is, whatever ends the run. Raises
    AtomError for an unknown row, missing libraries or files, and sides that disagree.
    """
    plan = _absolute(plan)
    chosen = _choose(rows(plan), patterns)
    _check(plan, chosen, out)
    facts, results, rates = machine.describe(), [], {}
    complete = False
    with contextlib.ExitStack() as opened:
        opened.callback(lambda: out and results and _write(out, plan, facts, results, complete))
        bar = opened.enter_context(tqdm(total=len(chosen), disable=None, leave=False, unit="row"))
        try:
            bench = opened.enter_context(Bench(plan, bar.set_postfix_str))
            facts["versions"] = bench.ours("about") | bench.peer("about")
            command.say(_introduction(facts) + "\n\n" + table.heading(("AToM-JAX", "transformers")))
            for row in chosen:
                bar.set_description(row.name)
                figures = row.measure(bench)
                if row.name in ("matmul", "read"):
                    rates[row.name] = max(map(statistics.median, (figures.ours, figures.peer)))
                results.append(table.summary(row, figures, rates))
                command.say(table.line(row, figures, rates))
                bar.update()
            complete = True
        except Refused as e:
            raise AtomError(str(e)) from None
        except KeyboardInterrupt:
            command.say(f"interrupted after {len(results)} of {len(chosen)} rows")
    return complete


def _choose(known: list[Row], patterns: list[str]) -> list[Row]:
    """Rows in their order; "matmul" and "read" always, since the others are put in relation to them."""
    for pattern in patterns:
        if not any(fnmatch.fnmatch(r.name, pattern) for r in known):
            raise AtomError(f"--rows={pattern}: no such row; there are {', '.join(r.name for r in known)}")
    patterns = ["matmul", "read", *patterns]
    return [r for r in known if any(fnmatch.fnmatch(r.name, p) for p in patterns)]


def _check(plan: Plan, chosen: list[Row], out: pathlib.Path | None) -> None:
    need_torch()
    if any(r.needs_model for r in chosen) and not pathlib.Path(plan.checkpoint, "config.json").is_file():
        raise AtomError(f"--checkpoint={plan.checkpoint}: no model there; `make smollm2` fetches the default one")
    if out and not out.parent.is_dir():
        raise AtomError(f"--out={out}: there is no directory {out.parent}")


def _absolute(plan: Plan) -> Plan:
    """Paths as the sides find them, wherever they run."""
    train = tuple(str(pathlib.Path(reference).absolute()) for reference in plan.train)
    return dataclasses.replace(plan, checkpoint=str(pathlib.Path(plan.checkpoint).absolute()), train=train)


def _introduction(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if k != "backend")
    gib = f", {facts['memory'] / 2**30:.0f} GiB" if facts["memory"] else ""
    text = f"{facts['processor']}, {facts['cores']} cores{gib}; {versions}; float32"
    if facts["load"] > BUSY * facts["cores"]:
        text += f"\nother programs are running (load {facts['load']:.1f}): don't trust the timings"
    return text


def _write(out: pathlib.Path, plan: Plan, facts: dict[str, Any], results: list[dict], complete: bool) -> None:
    content = {"complete": complete, "machine": facts, "plan": dataclasses.asdict(plan), "rows": results}
    write_text(out, json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Exit code 130 after SIGTERM too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = dataclasses.replace(
        _DEFAULT, checkpoint=CHECKPOINT.value, prompts=command.numbers("prompts", PROMPTS.value, "lengths"),
        new_tokens=NEW.value, train=tuple(TRAIN.value), repeats=REPEATS.value,
    )  # fmt: skip
    if LIST.value:
        print("\n".join(f"{r.name:24}{r.label}" for r in rows(plan)))
        return 0
    return 0 if run(plan, ROWS.value, pathlib.Path(OUT.value) if OUT.value else None) else 130


if __name__ == "__main__":
    command.run("lm", main)
