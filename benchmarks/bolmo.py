"""A Bolmo next to a transformer that reads every byte and to the subword model that it was made of.

    make smollm2
    python -m benchmarks.bolmo [--checkpoint=BOLMO] [--teacher=models/smollm2-135m-instruct] [--prompt_bytes=1023]
                               [--new_bytes=64] [--rows=1,8] [--repeats=5] [--policies=...] [--out=FILE.json]

All three have the teacher's layers, compute in float32 and read the same text (Austen's, held out), each in a
process of its own, in turns; medians. New text is given: every step is one of `atom_jax.generate`, sampling included,
but what was chosen is replaced by the text's next token, so that all make the same bytes. Patches end where the
Bolmo's own predictor ends them; without a --checkpoint the Bolmo is one before training, and they are the teacher's
tokens. In batches every row goes on with a text of its own after the same prompt.

unit      bytes per token or patch of the prompt; new: of what the first row goes on with.
MFLOP     operations for reading a byte of the prompt, in millions.
MB/byte   to read for one more byte of one row: weights, held keys and values, states.
encode    milliseconds on the host for the prompt's ids, of which Bolmo finds suffix subwords, too.
read      bytes of prompt per second. gen: bytes per second, all rows together; "by MB": over the byte transformer's,
          where MB/byte takes all the time. peak: most memory of a process that does this alone, in GB.

The second table is what a Bolmo's time goes into: layers over bytes, layers over patches, and steps in which rows
wait for each other. Measured with text in which no byte ends a patch; a prompt is read with 8 patches. Next to it the
bytes per second of the text, without patches, and with every byte a patch.
The third is the memory after the prompt per byte of it: entries held, their buffers, and states of layers over bytes.
Policies other than "none" may keep --share of a prompt's tokens or patches.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from tqdm import tqdm

from atom_jax.data.builtin import austen
from atom_jax.evaluation.metrics import columns
from atom_jax.files import write_text
from atom_jax.typing import AtomError
from benchmarks import command, machine
from benchmarks.compare import PAUSE
from benchmarks.worker import Worker

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A Bolmo; empty: one before training.")
TEACHER = flags.DEFINE_string("teacher", "models/smollm2-135m-instruct", "Transformer over subwords.")
PROMPT = flags.DEFINE_integer("prompt_bytes", 1023, "Bytes of the prompt.", lower_bound=64)
NEW = flags.DEFINE_integer("new_bytes", 64, "New bytes per row and measurement.", lower_bound=8, upper_bound=128)
CAPACITY = flags.DEFINE_float("capacity", 0.3125, "Patches per byte that there is room for.", 0.01, 1)
ROWS = flags.DEFINE_list("rows", ["1", "8"], "Batch sizes.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements, of which the median counts.", lower_bound=1)
POLICIES = flags.DEFINE_list("policies", ["none", "streaming_llm", "tova", "knorm"], "Cache policies by name.")
SHARE = flags.DEFINE_float("share", 0.25, "Share of tokens or patches that they keep.", 0, 1)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")
SIDES = {"bolmo": "Bolmo", "bytes": "bytes", "subwords": "subwords"}
Sides = dict[str, Worker]


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """All numbers."""
    rows = command.numbers("rows", ROWS.value)
    prompt, new = texts(max(rows))
    found: dict[str, Any] = {"machine": machine.describe(), "flags": {f.name: f.value for f in _FLAGS}}
    with contextlib.ExitStack() as opened:
        sides: Sides = {kind: opened.enter_context(Worker("benchmarks.bolmo_side")) for kind in SIDES}
        models = _models(opened.enter_context(tempfile.TemporaryDirectory()), say)
        for kind, side in sides.items():
            say(f"{SIDES[kind]}: loading")
            side("open", *models[kind])
            found[kind] = side("prompt", prompt, new)
            side("read")
        sides["bolmo"]("read", True)
        jobs = {(kind, "read"): ("read",) for kind in SIDES} | {("bolmo", "few"): ("read", True)}
        turns(sides, jobs, found, say)
        for n in rows:
            for kind, side in sides.items():
                say(f"{SIDES[kind]}: compiling for {n} rows")
                found[kind][f"schedule{n}"] = side("take", n)
                side("compile")
            jobs = {(kind, f"gen{n}"): ("step", "text") for kind in SIDES}
            jobs |= {("bolmo", f"{form}{n}"): ("step", form) for form in ("never", "always")}
            turns(sides, jobs, found, say)
        for kind, side in sides.items():
            say(f"{SIDES[kind]}: cache policies")
            found[kind]["memory"] = {name: side("hold", name, SHARE.value) for name in POLICIES.value}
        for kind in SIDES:
            for n in rows:
                say(f"{SIDES[kind]}: {n} rows in a fresh process")
                with Worker("benchmarks.bolmo_side") as side:
                    side("open", *models[kind])
                    side("prompt", prompt, new[:n])
                    side("read")
                    side("take", n)
                    side("step", "text", False)
                    found[kind][f"peak{n}"] = side("peak")
    return found


def _models(folder: str, say: Callable[[str], None]) -> dict[str, tuple]:
    """What each side opens."""
    say("making models")
    with Worker("benchmarks.bolmo_side") as side:
        side("make", TEACHER.value, folder)
    bolmo = CHECKPOINT.value or f"{folder}/bolmo"
    return {
        "bolmo": (bolmo, CAPACITY.value, bool(CHECKPOINT.value)), "bytes": (f"{folder}/bytes",),
        "subwords": (TEACHER.value,),
    }  # fmt: skip


def texts(rows: int) -> tuple[str, list[str]]:
    """The prompt, and what each row goes on with."""
    corpus = austen("validation")
    # The novel begins with names and dates.
    text = b"".join(corpus.read(i) for i in range(1, len(corpus))).decode("utf-8")
    if len(text) < PROMPT.value + rows * NEW.value:
        raise AtomError(f"--prompt_bytes: there are {len(text)} bytes of text, too few")
    starts = [PROMPT.value + r * NEW.value for r in range(rows)]
    return text[: PROMPT.value], [text[s : s + NEW.value] for s in starts]


def turns(
    sides: Sides, jobs: dict[tuple[str, str], tuple], found: dict[str, Any], say: Callable[[str], None]
) -> None:  # fmt: skip
    """Seconds of every job, (side, name) -> its call, into found[side][name]; measured in turns, so that what else
    the machine does disturbs all of them alike."""
    for n in range(REPEATS.value):
        for (kind, name), call in list(jobs.items())[n % len(jobs) :] + list(jobs.items())[: n % len(jobs)]:
            say(f"{SIDES[kind]}: {name}, {n + 1} of {REPEATS.value}")
            time.sleep(PAUSE)
            found[kind].setdefault(name, []).append(sides[kind](*call))


def speed(found: dict[str, Any]) -> str:
    """The three models next to each other."""
    rows = found["flags"]["rows"]
    lines = [["", "unit", "new", "MFLOP", "MB/byte", "encode", "read"]]
    for n in rows:
        lines[0] += [f"gen {n}", *(["by MB"] if n == "1" else []), f"peak {n}"]
    base = found["bytes"]
    for kind, name in SIDES.items():
        f = found[kind]
        read = PROMPT.value / statistics.median(f["read"])
        line = [name, f"{f['unit']:.2f}", f"{f['new_unit']:.2f}", f"{f['flops'] / 1e6:,.0f}"]
        line += [f"{f['moved'] / 1e6:,.0f}", f"{1e3 * f['encode']:.1f}", f"{read:,.0f}"]
        for n in rows:
            line.append(f"{int(n) * NEW.value / statistics.median(f[f'gen{n}']):,.0f}")
            line += [f"{base['moved'] / f['moved']:.1f}x"] if n == "1" else []
            line.append(f"{f[f'peak{n}'] / 1e9:.1f}")
        lines.append(line)
    return columns(lines, 1)


def shares(found: dict[str, Any]) -> str:
    """What a Bolmo's time goes into."""
    lines = [("", "over bytes", "over patches", "waiting", "bytes/s", "no patches", "all patches")]

    def median(name: str) -> float:
        return statistics.median(found["bolmo"][name])

    few = median("few") / median("read")
    rates = [f"{PROMPT.value / median(name):,.0f}" for name in ("read", "few")]
    lines.append(("read", f"{few:.0%}", f"{1 - few:.0%}", "", *rates, ""))
    for n in found["flags"]["rows"]:
        text, never, always = (median(f"{name}{n}") for name in ("gen", "never", "always"))
        steps = found["bolmo"][f"schedule{n}"]["steps"]
        local, waiting = never / text, (steps / NEW.value - 1) * never / text
        cells = [f"{x:.0%}" for x in (local, 1 - local - waiting, waiting)]
        rates = [f"{int(n) * NEW.value / s:,.0f}" for s in (text, never, always)]
        lines.append((f"gen {n}", *cells, *rates))
    return columns(lines, 1)


def memory(found: dict[str, Any]) -> str:
    """Bytes of memory per byte of text under cache policies."""
    lines = [("KB per byte of text", *(f"{name} {what}" for name in SIDES.values() for what in ("held", "buffers")))]
    for policy in found["flags"]["policies"]:
        name = policy if policy == "none" else f"{policy}, {SHARE.value:.0%}"
        cells = [
            f"{found[kind]['memory'][policy][what] / 1e3:,.2f}" for kind in SIDES for what in ("held", "buffers")
        ]
        lines.append((name, *cells))
    states = found["bolmo"]["memory"]["none"]["states"] if "none" in found["flags"]["policies"] else 0.0
    return f"{columns(lines, 1)}\nstates of the layers over bytes, all policies: {states / 1e3:.2f}"


_FLAGS = (CHECKPOINT, TEACHER, CAPACITY, PROMPT, NEW, ROWS, REPEATS, POLICIES, SHARE)


def main() -> None:
    """Prints three tables."""
    with tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False) as bar:
        found = measure(bar.set_description_str)
    print("\n\n".join((speed(found), shares(found), memory(found))), flush=True)
    if OUT.value:
        write_text(OUT.value, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command.run("bolmo", main)
