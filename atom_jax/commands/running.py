"""The commands train and eval, which train.py and eval.py are, too."""

from __future__ import annotations

import pathlib
import sys

from absl import flags, logging

from atom_jax.commands.flags import Flags, check_writable
from atom_jax.typing import AtomError


def train(argv: list[str]) -> int:
    """Trains a model; returns the exit code. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "train --config=FILE.py:variant --workdir=DIR",
        "Trains a model; the same command continues a run that was interrupted.",
    )
    known.add(flags.DEFINE_string, "config", None, "FILE.py or FILE.py:variant; a wrong name prints the list")
    known.add(flags.DEFINE_string, "workdir", None, "directory for everything that the run writes")
    known.add(flags.DEFINE_multi_string, "set", [], "changes fields of the configuration: NAME=VALUE, one or several")
    known.add(flags.DEFINE_string, "init_from", None, "the model to start from, as --set init_from=PATH")
    known.add(flags.DEFINE_bool, "compile_only", False, "compile the step, say what it needs per chip, stop")
    known.add(flags.DEFINE_string, "topology", None, "chips nobody has to have: v5p:4x4x4", "compile_only")
    known.add(flags.DEFINE_bool, "distributed", False, "join the processes of other hosts before anything else")
    known.add(flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0; found by itself on TPU and Slurm",
              "distributed")  # fmt: skip
    known.add(flags.DEFINE_integer, "process_id", None, "number of this process, from 0", "coordinator")
    known.add(flags.DEFINE_integer, "num_processes", None, "number of processes", "coordinator")
    known.alone("compile_only", "config", "set", "init_from", "topology", "verbosity")
    values, settings = _settings(known, argv)
    more = settings[len(values["set"].value) :]
    if more and (len(more) == len(settings) or "=" not in more[0]):
        raise AtomError(f"unexpected argument {more[0]!r}; settings are --set NAME=VALUE")
    if not values.config:
        raise AtomError("--config is missing: such as --config=configs/lm.py:quick")
    if not values.compile_only and not values.workdir:
        raise AtomError("--workdir is missing")
    if values.init_from:
        settings.append(f"init_from={values.init_from}")
    # Orbax logs every file that it writes, and tracebacks of what arrives here as one sentence.
    _quiet(values, logging.FATAL)
    sys.unraisablehook = _unraisable

    import jax

    from atom_jax.aot.training import check
    from atom_jax.training import loop, start

    if values.distributed:
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    experiment = start.configure(values.config, settings)
    if values.compile_only:
        report = check(experiment, values.topology)
        print(report)
        return 0 if report.fits else 1
    result = loop.fit(experiment, values.workdir)
    return 128 + result.signal if result.signal else 0


def evaluate(argv: list[str]) -> int:
    """Evaluates a model and prints a table; returns the exit code. argv: the command and its arguments. Raises
    AtomError for bad input."""
    known = Flags(
        "eval --checkpoint=PATH --tasks=NAME,NAME",
        "Evaluates a checkpoint; an interrupted evaluation with --out goes on when the command is given again.",
    )
    known.add(flags.DEFINE_string, "checkpoint", None, "what to evaluate")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors or LoRA for it: a shipped name or a directory")
    known.add(flags.DEFINE_list, "tasks", [], "names of tasks; a wrong name prints the list")
    known.add(flags.DEFINE_multi_string, "set", [], "FIELD=VALUE or TASK.FIELD=VALUE, one or several")
    known.add(flags.DEFINE_string, "config", None, "instead of a checkpoint, FILE.py:variant", "compile_only")
    known.add(flags.DEFINE_bool, "compile_only", False, "compile, say what scoring texts needs per chip, stop")
    known.add(flags.DEFINE_string, "topology", None, "chips nobody has to have: v5e:2x2", "compile_only")
    known.add(flags.DEFINE_string, "out", None, "JSON file for the results")
    known.alone("compile_only", "checkpoint", "adapter", "config", "set", "topology", "verbosity")
    values, settings = _settings(known, argv)
    _quiet(values, logging.WARNING)  # Orbax reports every file that it reads.

    import atom_jax
    from atom_jax import config
    from atom_jax.evaluation import run as evaluation
    from atom_jax.evaluation.tasks import EvalConfig

    if values.compile_only:
        from atom_jax.aot.generation import described
        from atom_jax.aot.scoring import scoring

        lm = described(values.checkpoint, values.config, values.adapter)
        cfg = evaluation.resolve(config.override(EvalConfig(), settings), values.checkpoint or "")
        report = scoring(lm, cfg, values.topology)
        print(report)
        return 0 if report.fits else 1
    if not values.checkpoint:
        raise AtomError("--checkpoint is missing: give the path of a model")
    evaluation.check_tasks(values.tasks, settings)
    check_writable("--out", values.out or None, parents=True)
    cfg = evaluation.resolve(config.override(EvalConfig(), settings), values.checkpoint)
    out = pathlib.Path(values.out) if values.out else None
    lm = atom_jax.load(values.checkpoint, adapter=values.adapter)
    results = evaluation.evaluate(lm, values.tasks, cfg, out)
    print(evaluation.table(results))
    return 0


def _settings(known: Flags, argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags, and all settings, which may follow one --set without repeating it."""
    known.add(flags.DEFINE_integer, "verbosity", None, "of the log, from -1 (warnings) to 1; errors are always said")
    values, rest = known.parse(argv, None)
    flags.FLAGS.mark_as_parsed()  # Grain has some, which it reads.
    return values, [*values["set"].value, *rest]


def _quiet(values: flags.FlagValues, level: int) -> None:
    logging.set_verbosity(level if values.verbosity is None else values.verbosity)


def _unraisable(report: sys.UnraisableHookArgs) -> None:
    """Leaves out what TensorStore's threads tell an event loop that Orbax closed when saving failed."""
    if "Event loop is closed" not in str(report.exc_value):
        sys.__unraisablehook__(report)
