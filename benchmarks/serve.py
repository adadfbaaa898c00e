"""What adaptive memory buys a server: requests at once and tokens per second at a fixed memory for the cache.

    python -m benchmarks.serve --checkpoint=models/smollm2-135m-instruct --cache_memory=256M

The same requests, all at once, go to one engine after another: with everything kept, with each of --adapters, with
each of --memory. An engine begins as many as --cache_memory lets it, which is the same for all. Each does the work
once before it is measured, so that nothing is compiled meanwhile; then a few of the requests are made one at a time,
in an engine of one row, and some are compared with what `generate` gives. HTTP is left out. With --peer transformers
makes the few requests too, one at a time, in the fastest of its settings. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from atom_jax.commands.serving import size_of
from atom_jax.files import write_text
from atom_jax.typing import LM, AtomError
from benchmarks import command
from benchmarks.compare import PEER as SIDE
from benchmarks.compare import need_torch
from benchmarks.worker import Worker

CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "What to load.")
ADAPTERS = flags.DEFINE_list("adapters", ["smollm2-135m-dms-4x", "smollm2-135m-dms-8x"], "Learned evictors for it.")
MEMORY = flags.DEFINE_multi_string("memory", ["tova:budget=256"], 'Cache policies. Repeatable; one of "" for none.')
CACHE = flags.DEFINE_string("cache_memory", "256M", "What the memory of all texts may take, in every line.")
ROWS = flags.DEFINE_integer("rows", 64, "Texts at once at most.")
REQUESTS = flags.DEFINE_integer("requests", 64, "Requests, which differ in length by up to a factor of two.")
PROMPT = flags.DEFINE_integer("prompt_tokens", 1024, "Tokens of the longest prompt.")
NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens of the longest text.")
ALONE = flags.DEFINE_integer("alone", 4, "Requests that are made one at a time.")
CHECKED = flags.DEFINE_integer("checked", 4, "Requests that are compared with what `generate` gives.")
PEER = flags.DEFINE_bool("peer", False, "One stream with transformers too; needs `make install-torch`.")
OUT = flags.DEFINE_string("out", None, "JSON file for the lines.")

HEAD = (
    "| memory | requests at once | cache, MiB at most | tokens/s | one stream, tokens/s | times one stream | equal |"
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One way to keep memory. at_once: most requests that ran together. mebibytes: of the cache's buffers at most.
    many, one: new tokens per second with all requests and with one at a time, prompts included. equal: of the texts
    that were compared, how many are those of `generate`, as "4 of 4"."""

    memory: str
    at_once: int
    mebibytes: float
    many: float
    one: float
    equal: str

    def __str__(self) -> str:
        numbers = f"{self.mebibytes:,.1f} | {self.many:,.1f} | {self.one:,.1f} | {self.many / self.one:.2f}"
        return f"| {self.memory} | {self.at_once} | {numbers} | {self.equal} |"


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    cache = size_of("--cache_memory", CACHE.value)
    if ALONE.value < 1:
        raise AtomError(f"--alone={ALONE.value}: expected at least 1")
    if PEER.value:
        need_torch()
    print(HEAD, "|---" * 7 + "|", sep="\n", flush=True)
    lines, peer = [], None
    for name, lm in models(CHECKPOINT.value, ADAPTERS.value, [text for text in MEMORY.value if text]):
        lines.append(measure(name, lm, orders(lm, REQUESTS.value, PROMPT.value, NEW.value), cache))
        print(lines[-1], flush=True)
        if PEER.value and peer is None:
            peer = theirs(CHECKPOINT.value, orders(lm, REQUESTS.value, PROMPT.value, NEW.value)[: ALONE.value])
    if peer:
        print("transformers {transformers}, one stream, {setting}: {one:,.1f} tokens/s".format(**peer))
    if OUT.value:
        found = {"flags": _flags(), "lines": [dataclasses.asdict(line) for line in lines], "peer": peer}
        write_text(OUT.value, json.dumps(found, indent=1))


def models(checkpoint: str, adapters: Sequence[str], policies: Sequence[str]) -> Any:
    """(name, model) for each line, the one that keeps everything first."""
    from atom_jax.checkpoint import load
    from atom_jax.kvcache.policies import parse
    from atom_jax.models import registry

    dense = load(checkpoint)
    yield "everything", dense
    for adapter in adapters:
        yield adapter, load(checkpoint, adapter=adapter)
    for policy in policies:
        yield policy, registry.with_memory(dense, parse(policy))


def orders(lm: LM, number: int, prompt: int, new: int) -> list[tuple[list[int], int]]:
    """Prompts, parts of a novel, and how many tokens are to follow each; the same for the same numbers."""
    from atom_jax.data.builtin import austen

    if lm.tokenizer is None:
        raise AtomError("--checkpoint: the model has no tokenizer")
    rng = np.random.default_rng(0)
    text = b"\n".join(austen("validation").texts)
    ids = np.asarray(lm.tokenizer.encode(text[: 12 * prompt * number].decode("utf-8", "replace")))
    if len(ids) <= prompt:
        raise AtomError(f"--prompt_tokens={prompt}: the text has {len(ids)} tokens")
    found = []
    for _ in range(number):
        n, at = int(rng.integers(prompt // 2, prompt + 1)), int(rng.integers(len(ids) - prompt))
        found.append((ids[at : at + n].tolist(), int(rng.integers(new // 2, new + 1))))
    return found


def measure(name: str, lm: LM, wanted: list[tuple[list[int], int]], cache: int) -> Line:
    """The line of one model."""
    import atom_jax

    with _engine(lm, ROWS.value, cache, wanted) as engine:
        _made(engine, wanted)
        engine.tally.peak_running = engine.tally.peak_nbytes = 0
        requests, seconds = _made(engine, wanted)
        tally = dataclasses.replace(engine.tally)
    few = wanted[: ALONE.value]
    with _engine(lm, 1, None, wanted) as engine:
        for order in few:
            _made(engine, [order])
        alone = [_made(engine, [order]) for order in few]
    new = sum(len(request.ids) for request in requests)
    one = sum(len(made[0].ids) for made, _ in alone) / sum(taken for _, taken in alone)
    checked = list(zip(wanted, requests))[: CHECKED.value]
    equal = sum(
        request.ids == atom_jax.generate(lm, [ids], most, stop_ids=()).ids[0] for (ids, most), request in checked
    )
    return Line(name, tally.peak_running, tally.peak_nbytes / 2**20, new / seconds, one, f"{equal} of {len(checked)}")


def theirs(checkpoint: str, few: list[tuple[list[int], int]]) -> dict[str, Any]:
    """What transformers makes of the requests, one at a time, in the setting that took the first one least time: one:
    new tokens per second, prompts included; setting; versions."""
    with contextlib.closing(Worker(SIDE)) as side:
        side("open", os.path.abspath(checkpoint))

        def seconds(ids: list[int], new: int) -> float:
            began = time.perf_counter()
            side("decode", [ids], new - 1)
            return time.perf_counter() - began

        taken = []
        for setting in side("settings", "decode"):
            side("use", setting)
            seconds(*few[0])
            taken.append((seconds(*few[0]), len(taken), setting))
        setting = min(taken)[-1]
        side("use", setting)
        one = sum(new for _, new in few) / sum(seconds(*order) for order in few)
        return {"one": one, "setting": ", ".join(f"{k} {v}" for k, v in setting.items()), **side("about")}


def _engine(lm: LM, rows: int, cache: int | None, wanted: list[tuple[list[int], int]]) -> Any:
    import atom_jax

    return atom_jax.Engine(lm, rows, cache_memory=cache, waiting=max(len(wanted), 1), beginnings=0)


def _made(engine: Any, wanted: list[tuple[list[int], int]]) -> tuple[list[Any], float]:
    """The requests, ended, and the seconds that all of them took."""
    began = time.perf_counter()
    with engine.together:
        requests = [engine.submit(ids, most, stop_ids=()) for ids, most in wanted]
    for request in requests:
        if request.result().end != "length":
            raise AtomError(f"a request was {request.end}: {request.error}")
    return requests, time.perf_counter() - began


def _flags() -> dict[str, Any]:
    known = (CHECKPOINT, ADAPTERS, MEMORY, CACHE, ROWS, REQUESTS, PROMPT, NEW, ALONE, CHECKED, PEER)
    return {"jax": jax.__version__, **{flag.name: flag.value for flag in known}}


if __name__ == "__main__":
    command.run("serve", main)
