"""The training loop: data in, steps, validation, checkpoints, and a way back in after any interruption."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from atom_jax import config, sharding
from atom_jax import params as params_lib
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.lock import locked
from atom_jax.checkpoint.steps import is_suspect
from atom_jax.checkpoint.store import Store, has_begun
from atom_jax.data.pipeline import merge_states
from atom_jax.data.sources import open_source
from atom_jax.inference.generate import generate
from atom_jax.models import registry
from atom_jax.training import optim, plots, start
from atom_jax.training.config import Experiment, check_resumable
from atom_jax.training.interrupt import GO, STOP, Agreement, Interrupts
from atom_jax.training.program import Program, check
from atom_jax.training.record import Recorder
from atom_jax.training.state import State, from_trees, to_trees
from atom_jax.training.watch import Watch
from atom_jax.typing import LM, TEXTS, AtomError


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the step it reached, the last validation, and the signal that ended it (0: none)."""

    step: int
    validation: dict[str, float]
    signal: int


def fit(exp: Experiment, workdir: str | pathlib.Path) -> Result:
    """Trains until `exp.train.steps`, continuing from the newest checkpoint in `workdir` if there is one. Where the
    experiment names a first one and has not begun itself, that comes before it, in `workdir`/first.

    SIGINT and SIGTERM end the run after the current step with a checkpoint. Raises AtomError for a configuration that
    does not fit the model, the devices, the data or the checkpoint, for a full disk while a checkpoint is saved, and
    when gradients stay not finite.
    """
    _keep_freed_memory()
    stages = exp.stages(pathlib.Path(workdir))
    begun = [i for i, (_, place) in enumerate(stages) if has_begun(place)]
    stages = stages[max(begun, default=0) :]
    for (before, _), (stage, _) in itertools.pairwise(stages):
        start.part(stage, before.model)
        check(stage)
        if registry.kind(stage.model).reads == TEXTS:  # images and worlds are looked at by their objectives
            for source in stage.data.sources:
                open_source(source, stage.data.split, stage.data.chat)
    for stage, place in stages:
        result = _stage(stage, place)
        if result.signal:
            break
    return result


def _keep_freed_memory() -> None:
    """Lets the C library keep what is freed. A step on CPU frees its buffers, which would otherwise go back to the
    system, to be asked for and cleared again in the next step."""
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # other C libraries lack this
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            mallopt(parameter, value)


def _stage(exp: Experiment, workdir: pathlib.Path) -> Result:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise AtomError(f"--workdir={workdir}: {e.strerror}") from None
    mesh = sharding.make_mesh(exp.mesh)
    with locked(workdir), jax.set_mesh(mesh), Interrupts() as interrupts, contextlib.ExitStack() as opened:
        run = _Run(exp, workdir, Program(exp, mesh, start.tokenizer(exp)), opened)
        return run.train(interrupts)


class _Run:
    """One process's part of a run: the state on the devices and everything open on the disk."""

    def __init__(self, exp: Experiment, workdir: pathlib.Path, program: Program, opened: contextlib.ExitStack):
        self.exp, self.workdir, self.program, self.opened = exp, workdir, program, opened
        self.store = opened.enter_context(Store(workdir / "checkpoints", exp.train.keep, program.extra))
        self.data = self._read("train")
        self.held_out = self._read("validation") if exp.train.eval_every else None
        self.held_out_start = self.held_out.get_state() if self.held_out else None
        self.state, self.at, notes = self._begin()
        self.saved = self.at
        first = jax.process_index() == 0
        if first:
            with staged(workdir) as staging:
                if program.setting.tokenizer is not None:
                    program.setting.tokenizer.save(staging)
                (staging / "experiment.json").write_text(json.dumps(config.to_json(exp), indent=1) + "\n")
        cfg = exp.train
        unit = program.objective.unit(exp)
        self.recorder = Recorder(workdir, self.at, cfg.steps, cfg.log_every, enabled=first, unit=unit)
        self.drawn = time.monotonic()
        opened.callback(self._finish)
        self.watch = Watch(cfg.max_bad_steps)
        self.validation: dict[str, float] = {}
        self.reference: dict[str, float] | None = None
        for line in notes:
            self.recorder.say(line)

    def train(self, interrupts: Interrupts) -> Result:
        """Steps until the end or an interruption, then saves."""
        cfg, agreement = self.exp.train, Agreement(self.program.setting.mesh, self.exp.train.checkpoint_minutes)
        # Metrics are read one step late, when they have long been there: the device never waits for Python.
        behind: tuple[int, Any] | None = None
        wish = GO
        if cfg.eval_first and cfg.eval_every and self.at == 0:
            self._validate()
        while self.at < cfg.steps and wish != STOP:
            self.state, metrics = self.program.step(self.state, self.program.put(next(self.data)))
            self.at += 1
            self.store.check()
            if behind:
                self._note(*behind)
            behind = self.at, metrics
            wish = agreement.ask(bool(interrupts.signal))
            last = self.at == cfg.steps
            judge = cfg.eval_every and (last or self.at % cfg.eval_every == 0) and wish != STOP
            save = last or wish != GO or (cfg.checkpoint_every and self.at % cfg.checkpoint_every == 0)
            if judge or save:
                self._note(*behind)
                behind = None
            if last:
                self.state = self.program.finished(self.state, self.data)
            if judge:
                self._validate()
            if save:
                self._save()
                agreement.saved()
            goes_on = not last and wish != STOP
            if goes_on and (judge or save) and time.monotonic() - self.drawn > plots.SECONDS:
                self._draw()
                self.recorder.restart_clock()
        self.store.wait()
        if wish == STOP:
            self.recorder.say(f"stopped after step {self.at}; the same command continues from there")
        return Result(self.at, self.validation, (interrupts.signal or 15) if wish == STOP else 0)

    def _begin(self) -> tuple[State, int, list[str]]:
        """The newest checkpoint's state, with the data where it was; else the first state."""
        found, damaged = self.store.resume(self._restored)
        if found is None:
            params, notes = start.begin(self.program, self.data)
            flops = registry.kind(self.exp.model).flops(self.exp.model, self.exp.data.seq_len)
            own = {k: spec for k, spec in self.program.spec.items() if k not in self.program.extra}
            size = f"{params_lib.count(own):,} parameters on {self.program.setting.mesh.size} devices, "
            size += f"{flops / 1e6:,.2f} million operations per token forward"
            return self.program.initial(params), 0, [size, *notes]
        step, state, data, changes = found
        self.data.set_state(data)
        notes = [*damaged, f"continuing from step {step}", *(f"changed: {line}" for line in changes)]
        if is_suspect(self.store.directory / str(step)):
            notes.append(f"step {step} was saved while steps went wrong; a step before is in {self.store.directory}")
        return state, step, notes

    def _restored(self, step: int) -> tuple[int, State, Any, list[str]]:
        """The state of a step, where the data was, and how the experiment has changed since."""
        saved, data = self.store.notes(step, "config", "data")
        where = str(self.store.directory / str(step))
        before = config.from_json(Experiment, saved, where)
        changes = check_resumable(before, self.exp, where)
        was, now = (float(optim.make_schedule(e.optim, e.train.steps)(step)) for e in (before, self.exp))
        if was != now:
            changes.append(f"so the learning rate after step {step} is {now:.3g} instead of {was:.3g}")
        trees = self.store.restore(step, to_trees(self.program.state, self.program.extra))
        return step, from_trees(trees, self.program.extra), data, changes

    def _read(self, split: str) -> Any:
        cfg = self.exp.data
        if split != "train":
            cfg = cfg.held_out(split, cfg.batch_size // self.exp.optim.accumulate)
        data = self.program.read(cfg)
        self.opened.callback(data.close)
        return data

    def _note(self, step: int, metrics: Any) -> None:
        values = jax.device_get(metrics)
        self.recorder.step(step, values)
        warning = self.watch.look(step, values)
        if warning:
            self.recorder.say(warning)

    def _save(self) -> None:
        """Starts to save this step, unless that has been done."""
        if self.saved == self.at:
            return
        # Processes with the same rows have the same state.
        states = {s["first_row"]: s for s in _from_all(self.data.get_state())}
        notes = {"data": merge_states(list(states.values())), "config": config.to_json(self.exp)}
        self.store.save(self.at, to_trees(self.state, self.program.extra), notes, self.watch.suspect)
        self.saved = self.at
        self.recorder.restart_clock()

    def _finish(self) -> None:
        """Closes the records and draws them, whatever ended the run."""
        self._draw(self.recorder.close)

    def _draw(self, before: Callable[[], None] | None = None) -> None:
        """Draws the curves, after `before`. An error here must not end the run, nor hide what ended it."""
        try:
            if before is not None:
                before()
            if jax.process_index() == 0:
                plots.draw(self.workdir, self.program.pages)
        except (OSError, AtomError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            print(f"{self.workdir}: the curves cannot be drawn ({why})", file=sys.stderr)
        self.drawn = time.monotonic()

    def _judged(self) -> Any:
        """The batches of a validation."""
        self.held_out.set_state(self.held_out_start)
        return itertools.islice(self.held_out, self.exp.train.eval_batches)

    def _validate(self) -> None:
        """Judges the model on the same batches every time, and lets it write a sample."""
        if self.reference is None:
            self.reference = self.program.reference(self._judged)
        self.validation = self.program.validate(self.state, self._judged()) | self.reference
        self.recorder.validation(self.at, self.validation)
        cfg = self.exp.train
        if cfg.sample_prompt and jax.process_count() == 1:
            lm = LM(self.exp.model, self.program.model(self.state), self.program.setting.tokenizer)
            sample = generate(
                lm, [cfg.sample_prompt], cfg.sample_tokens, temperature=0.8, key=jax.random.key(self.at)
            )
            self.recorder.sample(self.at, cfg.sample_prompt + sample.text[0])
        self.recorder.restart_clock()


def _from_all(value: Any) -> list[Any]:
    """A JSON-able value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(t[:n].tobytes()) for t, n in zip(texts, sizes)]
