"""World models that find their units over time, next to others: what their plans bring over what they cost.

    python -m benchmarks.world [--variants=watch,watch_every,watch_fixed] [--seeds=3] [--episodes=200]
                               [--lengths=40,160] [--planner=...] [--workdir=runs/world] [--set train.steps=...]
                               [--out=FILE.json] [--picture=plan.png]

Every variant of configs/world.py is trained with every seed (or found trained) in WORKDIR/VARIANT/SEED, and plans as
many episodes after watches of each length; all meet the same episodes and candidates. The first seed of `watch_every`
also plays with caches that hold as many entries as `watch` has units, and with a window of as many frames. What was
interrupted goes on when the command is given again. watch_cosine, watch_change and watch_local take part where
--variants names them. The columns, means over the seeds:

success   share of episodes that end at the treasure, and, in brackets, of each seed. wrong: that end at another pad.
watch     steps of the main network while watching: frames at which it runs. first, future: per imagined future, at
          its first step, whose frame is real, and at all others together.
entries   that a layer of the main network holds when the plan is made, and, in brackets, as a share of those of
          `watch_every`. kB: of the model's whole memory then, and of one more imagined future. Mflop: operations of a
          decision, the watch included, per episode, counted from the sizes of products.
seconds   of a decision, all episodes at once. train: seconds of the training (measured where it was not interrupted).

The ceiling is the share of episodes in which the treasure can be reached within the horizon, `simulator` plans with
the world itself, `random` does not plan. The end says what was aimed at (`world_targets`) and whether it was reached.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags

import atom_jax
from atom_jax import config
from atom_jax.checkpoint.store import has_begun
from atom_jax.evaluation import cache
from atom_jax.evaluation.tasks.plan import PlanSettings, planned
from atom_jax.fields import read_json
from atom_jax.inference import planners
from atom_jax.kvcache import policies
from atom_jax.models import registry
from atom_jax.models.flops import matrices
from atom_jax.training import loop, record
from atom_jax.training.config import Experiment
from atom_jax.typing import LM, AtomError
from benchmarks import command, machine, world_tables, world_targets
from benchmarks.world_tables import KNOWN

VARIANTS = flags.DEFINE_list("variants", list(KNOWN[:3]), f"Variants of configs/world.py: {', '.join(KNOWN)}.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each.", lower_bound=1)
EPISODES = flags.DEFINE_integer("episodes", 200, "Episodes per length.", lower_bound=1)
LENGTHS = flags.DEFINE_list("lengths", ["40", "160"], "Frames of a watch.")
PLANNER = flags.DEFINE_string("planner", "shooting:n=256,horizon=6", "As of `python -m atom_jax plan`.")
WORKDIR = flags.DEFINE_string("workdir", "runs/world", "Where the runs are.")
SET = flags.DEFINE_multi_string("set", [], "Changes to the last stage of every variant, as for train.py.")
OUT = flags.DEFINE_string("out", None, "Also write all results to this JSON file.")
PICTURE = flags.DEFINE_string("picture", None, "Also draw success over steps of the main network to this PNG.")
# Caches of `watch_every` with so many entries: names of the rows, and policies.
RIVALS = {
    "streaming_llm": "streaming_llm:sinks=1,budget={n}", "tova": "tova:budget={n}", "random": "random:budget={n}",
    "wmerge": "wmerge:budget={n}",
}  # fmt: skip


def trained(variant: str, seed: int, workdir: pathlib.Path) -> tuple[LM, float | None]:
    """The model of a variant and a seed, trained where that has not been done; and the seconds that it took."""
    folder = workdir / variant / str(seed)
    exp = seeded(config.override(config.load_file(f"configs/world.py:{variant}"), SET.value), seed)
    note, fresh, began = folder / "seconds.json", not has_begun(folder) and not folder.exists(), time.perf_counter()
    if loop.fit(exp, folder).signal:
        raise AtomError("interrupted; the same command goes on")
    if fresh:
        cache.write_json(note, {"seconds": time.perf_counter() - began})
    return atom_jax.load(folder), read_json(note)["seconds"] if note.exists() else None


def seeded(exp: Experiment, seed: int) -> Experiment:
    """The experiment with other episodes and other first parameters."""
    first = None if exp.first is None else seeded(exp.first, seed)
    # Later stages draw nothing, and are compiled once for all seeds.
    own = {"seed": seed} if first is None else {}
    return dataclasses.replace(exp, first=first, data=dataclasses.replace(exp.data, seed=seed), **own)


def settings(length: int) -> PlanSettings:
    """What is planned after watches of this length."""
    return PlanSettings("watch", PLANNER.value, EPISODES.value, length, seed=1000)


def measure(name: str, lm: LM, folder: pathlib.Path, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """What plans bring after watches of these lengths, measured where that has not been done under this name."""
    rows = []
    for length in lengths:
        asked, file = settings(length), folder / f"plan-{name}-{length}.json"
        kept = read_json(file) if file.exists() else {}
        if kept.get("settings") != config.to_json(asked) or "bytes_future" not in kept:
            report = planned(lm, asked)
            kept = {"settings": config.to_json(asked), **report, "mflop": operations(lm, report) / 1e6}
            cache.write_json(file, kept)
        rows.append({k: v for k, v in kept.items() if k not in ("episodes_of", "units_of", "settings")})
    return rows


def operations(lm: LM, report: dict[str, Any]) -> float:
    """Of a decision with its watch, per episode: all layers outside run at every frame, and the main network at as
    many as it was found to, where it reads the entries that it holds."""
    cfg = lm.config
    outer = registry.of(cfg).flops(dataclasses.replace(cfg, layout=(cfg.layout[0], "T0", cfg.layout[2])), 1)
    spec = registry.of(cfg).spec(cfg)["stage1"]["main"]
    layers = spec["0"]["mixer"]["o"].shape[0]
    inner = 2.0 * matrices(spec) + 4.0 * layers * cfg.d_model[1] * report["units"]
    futures, horizon = report["futures"], report["horizon"]
    steps = report["main_steps_watch"] + futures * (report["main_steps_decision"] + report["main_steps_imagined"])
    return outer * (report["frames"] + futures * horizon) + inner * steps


def rivals(lm: LM, entries: int) -> dict[str, LM]:
    """The model of every frame a unit, with caches of so many entries, and with a window of so many frames."""
    found = {
        f"watch_every, {name}": registry.with_memory(lm, policies.parse(text.format(n=entries)))
        for name, text in RIVALS.items()
    }
    cfg = dataclasses.replace(lm.config, window=(lm.config.window[0], entries - 1))
    return found | {"watch_every, window": dataclasses.replace(lm, config=cfg)}


def run(workdir: pathlib.Path) -> dict[str, Any]:
    """All results: for every name, a list over seeds of lists over lengths."""
    lengths = command.numbers("lengths", LENGTHS.value, "frames", 3)
    found: dict[str, Any] = {"machine": machine.describe(), "lengths": lengths}
    found |= {"episodes": EPISODES.value, "train_seconds": {}, "secret_right": {}, "rows": {}}
    variants, number = world_tables.variants(VARIANTS.value), 0
    total = len(variants) * SEEDS.value
    for variant in variants:
        for seed in range(SEEDS.value):
            number += 1
            print(f"[{number}/{total}] {variant}, seed {seed}", file=sys.stderr, flush=True)
            folder = workdir / variant / str(seed)
            lm, seconds = trained(variant, seed, workdir)
            found["train_seconds"].setdefault(variant, []).append(seconds)
            lines = record.read(folder / "metrics.jsonl")
            known = [x["secret_right"] for x in lines if x["kind"] == "validation" and "secret_right" in x]
            found["secret_right"].setdefault(variant, []).extend(known[-1:])
            found["rows"].setdefault(variant, []).append(measure(variant, lm, folder, lengths))
            units = found["rows"].get("watch")
            if variant == "watch_every" and seed == 0 and units is not None:
                # As many as surprise units are held after the shortest watch, rounded up.
                entries = int(np.ceil(np.mean([rows[0]["units"] for rows in units])))
                for name, other in rivals(lm, entries).items():
                    found["rows"].setdefault(name, []).append(measure(f"{name}, {entries}", other, folder, lengths))
            if OUT.value:
                cache.write_json(pathlib.Path(OUT.value), found | {"targets": world_targets.targets(found)})
            jax.clear_caches()
    return found


def main() -> None:
    """Prints what was found, and how it stands to the targets."""
    planners.parse(PLANNER.value)  # before anything is trained
    workdir = pathlib.Path(WORKDIR.value)
    found = run(workdir)
    print(world_tables.table(found))
    print(f"\n{world_targets.table(world_targets.targets(found))}")
    if PICTURE.value:
        world_tables.draw(found, PICTURE.value)
    print(json.dumps({"machine": found["machine"]}), file=sys.stderr)


if __name__ == "__main__":
    # Seeds share their programs.
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache", "jax").absolute()))
    command.run("world", main)
