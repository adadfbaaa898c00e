"""Runs tasks on a model: plans, scores what the cache doesn't hold, sums up, writes the results."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from atom_jax import config, sharding
from atom_jax.data.config import DataConfig
from atom_jax.data.numbered import PREFIX
from atom_jax.evaluation import cache, loglik
from atom_jax.evaluation.encode import Encoder, Item
from atom_jax.evaluation.metrics import Result, columns
from atom_jax.evaluation.tasks import TASKS, EvalConfig
from atom_jax.evaluation.tasks.task import Runner
from atom_jax.fields import read_json
from atom_jax.models import registry
from atom_jax.models.fingerprint import fingerprint
from atom_jax.terminal import progress
from atom_jax.typing import LM, TEXTS, AtomError

_LONGEST = 2048
# Fields of tasks that the training data fill in, and the prefix of such data.
_OF_DATA = {
    "images": ("source", "image:"), "reduction": ("source", "labelled:"), "plan": ("env", PREFIX),
    "frames": ("env", PREFIX),
}  # fmt: skip


def check_tasks(names: Sequence[str], settings: Sequence[str] = ()) -> None:
    """Raises AtomError unless every name is a task, and there is one, and settings such as "bpb.limit=9" are of tasks
    that are named."""
    if not names:
        raise AtomError(f"--tasks is missing: the tasks are {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise AtomError(f"--tasks: no task {name!r}; the tasks are {', '.join(TASKS)}")
    for setting in settings:
        task = setting.strip().partition(".")[0]
        if task in TASKS and task not in names:
            raise AtomError(f"--set {setting}: has no meaning without {task} among --tasks")


def resolve(cfg: EvalConfig, checkpoint: str) -> EvalConfig:
    """Fills in what depends on the checkpoint: the sources of `bpb`, where they are texts, those of `images` and
    `reduction`, the worlds of `plan` and `frames`, and max_length, from the experiment.json of a training directory
    (or of the one that holds this step); and what the processes of `lasting` load."""
    data = _training_data(checkpoint)
    if cfg.lasting.processes and not cfg.lasting.checkpoint:
        cfg = dataclasses.replace(cfg, lasting=dataclasses.replace(cfg.lasting, checkpoint=checkpoint))
    for name, (field, prefix) in _OF_DATA.items():
        task = getattr(cfg, name)
        if not getattr(task, field) and data and data.sources[0].startswith(prefix):
            source = {field: data.sources[0].removeprefix(prefix)}
            cfg = dataclasses.replace(cfg, **{name: dataclasses.replace(task, **source)})
    if not cfg.bpb.sources:
        sources = data.sources if data and not data.chat else ("austen",)
        cfg = dataclasses.replace(cfg, bpb=dataclasses.replace(cfg.bpb, sources=sources))
    if not cfg.max_length and data:
        cfg = dataclasses.replace(cfg, max_length=data.seq_len)
    return cfg


def evaluate(lm: LM, names: Sequence[str], cfg: EvalConfig, out: pathlib.Path | None = None) -> dict[str, Result]:
    """Results of the named tasks.

    out: a JSON file for them, written after every task. Beside it, OUT.items.jsonl holds the scores of single items;
        a run that was interrupted goes on from there. None: nothing is kept.
    Raises AtomError for unknown tasks, missing data, bad settings, and an `out` that holds no results.
    """
    check_tasks(names)
    reads = registry.kind(lm.config).reads
    for name in names:
        if (about := getattr(TASKS[name], "reads", TEXTS)) != reads:
            raise AtomError(f"{name}: this task is for models of {about}, and this one reads {reads}")
    encoder = make_encoder(lm, cfg) if reads == TEXTS else None
    model = fingerprint(lm)
    if out is not None:
        cache.check_out(out)
    whole, (lm, mesh) = lm, _place(lm, cfg.mesh)
    results: dict[str, Result] = {}
    report = {"fingerprint": model, "family": lm.family, "config": _used(cfg, names), "tasks": {}}
    for name in names:
        began = time.monotonic()
        task, settings = TASKS[name], getattr(cfg, name)
        if isinstance(task, Runner):
            results[name] = task.run(whole, settings, encoder, out)
        else:
            plan = task.plan(settings, encoder)
            key = cache.key(model, name, plan.items, cfg.batch_tokens)
            items = cache.ItemCache(out and out.with_name(out.name + ".items.jsonl"), key)
            with contextlib.closing(items):
                _score(lm, plan.items, cfg.batch_tokens, items, mesh, name)
                results[name] = plan.summarize([items.done[i] for i in range(len(plan.items))])
        report["tasks"][name] = _entry(results[name], time.monotonic() - began)
        if out is not None:
            cache.write_json(out, report)
    return results


def row_length(lm: LM, cfg: EvalConfig) -> int:
    """Tokens that the model sees at once. Raises AtomError for bad settings."""
    length = cfg.max_length or min(lm.config.max_length, _LONGEST)
    if length < 2 or cfg.batch_tokens < 1:
        raise AtomError("max_length must be at least 2, and batch_tokens at least 1")
    if length > lm.config.max_length:
        raise AtomError(f"max_length: {length} is beyond the model's {lm.config.max_length} positions")
    return length


def make_encoder(lm: LM, cfg: EvalConfig) -> Encoder:
    """How texts become tokens for this model. Raises AtomError for bad settings."""
    if cfg.front not in ("auto", "yes", "no"):
        raise AtomError(f"front={cfg.front}: expected auto, yes or no")
    length = row_length(lm, cfg)
    if lm.tokenizer is None:
        raise AtomError("the checkpoint has no tokenizer, and the tasks are texts")
    front = bool(lm.tokenizer.front) if cfg.front == "auto" else cfg.front == "yes"
    return Encoder(lm.tokenizer, length, front)


def table(results: dict[str, Result]) -> str:
    """The results as lines of text."""
    rows = [("task", "metric", "value", "stderr", "n")]
    for task, result in results.items():
        if not result.table:
            for name, metric in result.metrics.items():
                rows.append((task, name, f"{metric.value:.4f}", f"{metric.stderr:.4f}", str(result.count)))
    own = [f"{task}\n{result.table}" for task, result in results.items() if result.table]
    return "\n\n".join(([columns(rows, 2)] if len(rows) > 1 else []) + own)


def _score(lm: LM, items: list[Item], batch_tokens: int, done: cache.ItemCache, mesh: Any, name: str) -> None:
    """Scores the batches that `done` doesn't hold whole."""
    multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    work = loglik.plan(items, batch_tokens, multiple)
    left = [w for w in work if not all(i in done.done for i in w.items)]
    tokens = {id(w): sum(map(len, w.rows)) for w in work}
    total = sum(tokens.values())
    bar = progress(
        total=total,
        initial=total - sum(tokens[id(w)] for w in left),
        desc=name,
        unit="tok",
        unit_scale=True,
    )
    with bar, contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for one, scores in loglik.score(lm, items, left, batch_tokens, mesh):
            done.add(one.items, scores)
            bar.update(tokens[id(one)])


def _place(lm: LM, cfg: sharding.MeshConfig) -> tuple[LM, Any]:
    """Spreads the parameters over the devices, when there are several."""
    if len(jax.devices()) == 1:
        return lm, None
    mesh = sharding.make_mesh(cfg)
    spec = registry.kind(lm.config).spec(lm.config)
    return dataclasses.replace(lm, params=jax.device_put(lm.params, sharding.shardings(spec, mesh))), mesh


def _training_data(checkpoint: str) -> DataConfig | None:
    path = pathlib.Path(checkpoint)
    for folder in (path, path.parent.parent):
        file = folder / "experiment.json"
        if file.is_file() and (folder == path or path.parent.name == "checkpoints"):
            try:
                data = read_json(file)["data"]
            except (AtomError, KeyError):
                raise AtomError(f"{file} has no readable data configuration") from None
            return config.from_json(DataConfig, data, f"{file}: data")
    return None


def _used(cfg: EvalConfig, names: Sequence[str]) -> dict[str, Any]:
    """The settings that these tasks depend on."""
    return {k: v for k, v in config.to_json(cfg).items() if k not in TASKS or k in names}


def _entry(result: Result, seconds: float) -> dict[str, Any]:
    metrics = {
        name: {"value": value, "stderr": None if math.isnan(stderr) else stderr}
        for name, (value, stderr) in result.metrics.items()
    }
    return {"metrics": metrics, "count": result.count, **result.notes, "seconds": round(seconds, 1)}
