"""The tables of `benchmarks.kv`: what is measured, in which order, and how it is printed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import atom_jax
from atom_jax.evaluation.run import make_encoder
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.evaluation.tasks.kv import Kv, KvSettings
from atom_jax.evaluation.tasks.kv_cells import table
from atom_jax.files import write_text
from atom_jax.kvcache import policies
from atom_jax.models import registry
from atom_jax.typing import LM, AtomError
from benchmarks import kv_parity, kv_speed, machine
from benchmarks.command import say
from benchmarks.kv_speed import Speed
from benchmarks.worker import Worker

PARTS = ("parity", "recall", "speed")
PEER = "benchmarks.press"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    checkpoint: str
    adapters: tuple[str, ...]
    parts: tuple[str, ...]
    kvpress: str
    settings: KvSettings
    speed: Speed
    speed_policy: str


def measure(plan: Plan, out: pathlib.Path | None = None) -> bool:
    """Measures and prints; returns whether both sides agreed. `out` gets what there is, whatever ends the run.

    Raises AtomError for bad input, and RuntimeError where kvpress fails.
    """
    for part in plan.parts or ("",):
        if part not in PARTS:
            raise AtomError(f"--parts: no part {part!r}; expected some of {', '.join(PARTS)}")
    if out and not out.parent.is_dir():
        raise AtomError(f"--out={out}: there is no directory {out.parent}")
    found: dict[str, Any] = {"complete": False, "machine": machine.describe(), "plan": dataclasses.asdict(plan)}
    with contextlib.ExitStack() as opened:
        opened.callback(lambda: out and write_text(out, json.dumps(found, indent=1) + "\n"))
        base = atom_jax.load(plan.checkpoint, dtype="float32")
        if getattr(base.config, "memory", None) is not None:
            raise AtomError(f"--checkpoint={plan.checkpoint}: expected a model without a memory of its own")
        learned = [(name, atom_jax.load(plan.checkpoint, adapter=name, dtype="float32")) for name in plan.adapters]
        found["versions"] = {"jax": jax.__version__}
        windows = kv_parity.asks(base, plan.settings)
        agreed = True
        if "parity" in plan.parts:
            agreed = _parity(plan, base, learned, windows, found)
        if "recall" in plan.parts:
            _recall(plan, base, found)
        if "speed" in plan.parts:
            _speed(plan, base, learned, found)
        found["complete"] = True
    return agreed


def _parity(plan: Plan, base: LM, learned: list, windows: tuple, found: dict[str, Any]) -> bool:
    settings, rows = plan.settings, []
    found["windows"] = [ask.start for ask in windows]
    with contextlib.ExitStack() as opened:
        peer = None
        if pathlib.Path(plan.kvpress).exists():
            peer = opened.enter_context(Worker(PEER, plan.kvpress))
            found["versions"] |= peer("about")
            peer("open", str(pathlib.Path(plan.checkpoint).absolute()))
        else:
            say(f"--kvpress={plan.kvpress} is not there (`make install-kvpress`): only our side is measured")
        for row in kv_parity.compare([("", base), *learned], settings, windows, peer):
            rows.append(row)
            found["parity"] = [{**dataclasses.asdict(r), "difference": r.difference} for r in rows]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    say(f"{len(windows)} windows of {settings.context} tokens and {settings.scored} scored; float32; {versions}\n")
    say(kv_parity.table(rows))
    wrong = [f"{r.policy} {r.budget}" for r in rows if not r.agrees]
    if wrong:
        say(f"\n* differs by more than {kv_parity.CLOSE} nats: {', '.join(wrong)}")
    return not wrong


def _recall(plan: Plan, base: LM, found: dict[str, Any]) -> None:
    settings = dataclasses.replace(
        plan.settings, parts=("facts",), adapters=plan.adapters, fact_lengths=(plan.settings.context,)
    )
    rows = Kv().run(base, settings, make_encoder(base, EvalConfig()), None).notes["rows"]
    found["recall"] = [row for row in rows if ":" not in row["part"]]
    say(f"\n{found['recall'][0]['windows']} facts, planted and asked for afterwards\n")
    say(table(found["recall"]))


def _speed(plan: Plan, base: LM, learned: list, found: dict[str, Any]) -> None:
    speed = plan.speed
    policy = plan.speed_policy or f"tova:budget={max(1, speed.context // 8)}"
    budget = registry.with_memory(base, policies.parse(policy))
    text = dataclasses.replace(
        plan.settings, context=speed.context - 1, scored=1, windows=1, sources=plan.settings.sources[-1:]
    )
    prompt = np.asarray(kv_parity.asks(base, text)[0].context)
    rows: list[kv_speed.Row] = []
    with tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False) as bar:
        models = [("dense", base), *learned, (policy, budget)]
        for more in kv_speed.measure(models, prompt, speed, bar.set_description_str):
            rows += more
            found["speed"] = [dataclasses.asdict(r) for r in rows]
    say(f"\ndecoding after a text of {speed.context:,} tokens ({text.sources[0]}); medians of {speed.repeats}\n")
    say(kv_speed.table(rows))
