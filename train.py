"""Trains a model.

    python train.py --config=configs/lm.py:quick --workdir=runs/quick [--set optim.learning_rate=1e-3 train.steps=9]

The same command continues a run that was interrupted. WORKDIR receives metrics.jsonl, tb/ (TensorBoard), plots/,
checkpoints/ and experiment.json. `python -m atom_jax generate --checkpoint=WORKDIR` uses the result.
"""

from __future__ import annotations

import sys

from absl import app, flags, logging

CONFIG = flags.DEFINE_string("config", None, "FILE.py or FILE.py:variant, see configs/.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for everything that the run writes.")
SET = flags.DEFINE_multi_string("set", [], "Changes fields of the configuration: NAME=VALUE, one or several.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile the step, say what it needs per chip, stop.")
TOPOLOGY = flags.DEFINE_string("topology", None, "With --compile_only: chips nobody has to have, such as v5p:4x4x4.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of other hosts before anything else.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; found by itself on TPU and Slurm.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: number of this process, from 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: number of processes.")


def run(settings: list[str]) -> int:
    """Does what the flags say; returns the exit code."""
    import jax

    from atom_jax.aot.training import check
    from atom_jax.training import loop, start

    if DISTRIBUTED.value:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    experiment = start.configure(CONFIG.value, settings)
    if COMPILE_ONLY.value:
        report = check(experiment, TOPOLOGY.value)
        print(report)
        return 0 if report.fits else 1
    result = loop.fit(experiment, WORKDIR.value)
    return 128 + result.signal if result.signal else 0


def _unraisable(report: sys.UnraisableHookArgs) -> None:
    """Leaves out what TensorStore's threads tell an event loop that Orbax closed when saving failed."""
    if "Event loop is closed" not in str(report.exc_value):
        sys.__unraisablehook__(report)


def main(argv: list[str]) -> None:
    """Prints bad input and what the system refuses as one sentence."""
    from atom_jax import terminal
    from atom_jax.typing import AtomError

    def command() -> int:
        if len(argv) > 1 and (not SET.value or "=" not in argv[1]):
            raise AtomError(f"unexpected argument {argv[1]!r}")
        if not COMPILE_ONLY.value and not WORKDIR.value:
            raise AtomError("--workdir is missing")
        return run([*SET.value, *argv[1:]])

    sys.unraisablehook = _unraisable
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file that it writes, and tracebacks of what arrives here as one sentence.
        logging.set_verbosity(logging.FATAL)
    sys.exit(terminal.run("train.py", command))


if __name__ == "__main__":
    from atom_jax import terminal

    # Also for what is said about flags before `main`.
    sys.exit(terminal.run("train.py", lambda: app.run(main)))
